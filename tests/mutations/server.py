"""For each line of arguments that comes in, runs pytest in a fork of this process, where torch is loaded already, and
answers with the fork's exit code. What pytest says goes to the file named first."""

import json
import os
import sys

import pytest
import torch._dynamo.testing  # noqa: F401
import triton  # noqa: F401

sys.path.insert(0, os.getcwd())
for line in sys.stdin:
    log, *arguments = json.loads(line)
    if (child := os.fork()) == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = int(pytest.main(arguments))
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
