"""Turn a checkpoint into a Hugging Face folder: safetensors, config, tokenizer, model card."""

from __future__ import annotations

from pathlib import Path

from opd.errors import UserError
from opd.models import load_model, load_tokenizer

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [on-policy-distillation]
---

# {name}

A causal language model trained by on-policy distillation with [opd](https://pypi.org/project/opd).

- Architecture: {architecture}, {parameters:,} parameters
- Exported from: `{source}`

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""


def export(checkpoint: str, output: str) -> None:
    """Write a Hugging Face folder from a checkpoint.

    Args:
        checkpoint: Checkpoint of opd fit (or anything that --model.student accepts).
        output: Folder to write; it must be empty or not exist.

    Raises:
        UserError: The checkpoint cannot be read, or the folder not be written.
    """
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    folder = Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    if any(folder.iterdir()):
        raise UserError(f"--output {output}: is not empty; name a new folder")
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = CARD.format(
            name=folder.name,
            architecture=type(model).__name__,
            parameters=model.num_parameters(),
            source=Path(checkpoint).name,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error})") from error
    print(f"wrote {output}")
