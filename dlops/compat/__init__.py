"""Other libraries' functions and modules on dlops ops: their names and signatures, one import changed."""
