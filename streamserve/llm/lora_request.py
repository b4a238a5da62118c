"""Which adapter answers: vLLM's class of that name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter in PEFT's format: the directory ``lora_path``, known as ``lora_name``.

    It is loaded when a request first names it, and stays for later ones as long as there is room
    (``max_loras``). ``lora_int_id`` is vLLM's, of no meaning here.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.lora_path).expanduser()
