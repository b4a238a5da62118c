"""Run llama.cpp's converter on a checkpoint whose tokenizer it does not know.

    python gguf.py CONVERT_HF_TO_GGUF.PY CHECKPOINT --outtype bf16 --outfile FILE

The converter knows a tokenizer by the hash of one encoded text, and refuses others. The random
checkpoints of ``tools/make_checkpoint.py`` split text as GPT-2 does: it is told so. Runs in a
virtual environment with torch, transformers and sentencepiece; imports nothing of ours.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Tell, then convert."""
    script = Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "gpt-2"
    sys.argv = sys.argv[1:]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
