"""Load an export as a stranger would, and leave its logits beside it: `python -m ptrain.checkpoint.reload`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str, ids: str) -> None:
    """Write `logits.safetensors` with the logits [tokens, v] of the token ids into the folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([json.loads(ids)])).logits[0]
    save_file({"logits": logits.contiguous()}, Path(folder) / "logits.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
