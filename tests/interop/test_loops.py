"""Trainer, Accelerate and Lightning: small checkpoints, exact resumption, nothing lost."""

import copy
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
SPEC = sl.lora(rank=2, alpha=6)


def bert(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **{"vocab_size": 32, "intermediate_size": 24, "max_position_embeddings": 8}, **sizes
    )
    return transformers.BertForSequenceClassification(config)


def examples(count=32):
    words = torch.randint(3, 32, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": own, "labels": (own < 8).any().long()} for own in words]


def batch():
    own = examples(8)
    return {key: torch.stack([each[key] for each in own]) for key in own[0]}


def trainer_of(model, adapter, folder, callbacks=True, epochs=3, **options):
    from superlora.torch.trainer import AdapterCheckpoints

    arguments = transformers.TrainingArguments(
        **{"output_dir": str(folder), "num_train_epochs": epochs, "learning_rate": 1e-2},
        **{"per_device_train_batch_size": 8, "save_strategy": "epoch", "report_to": []},
        **{"use_cpu": True, "disable_tqdm": True, "seed": 5},
        **options,
    )
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=examples(),
        eval_dataset=examples(8),
        callbacks=[AdapterCheckpoints(adapter)] if callbacks else [],
    )


def adapted(seed=0, **options):
    model = bert(seed)
    options = {"also": ["classifier"], "dropout": 0.1} | options
    return model, slt.attach(model, SPEC, ["query", "value"], **options)


def trained_bits(adapter):
    return {name: own.detach().clone() for name, own in adapter.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], own) for name, own in expected.items())


OPTIONS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "checkpointed": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.filterwarnings("ignore")  # the loops' own
def test_trainer_resumes_as_if_it_had_not_stopped(case, tmp_path):
    model, adapter = adapted()
    if case == "reentrant":
        model.enable_input_require_grads()
    start = trained_bits(adapter)
    trainer_of(model, adapter, tmp_path / "whole", **OPTIONS[case]).train()
    expected = trained_bits(adapter)
    assert not any(torch.equal(expected[name], own) for name, own in start.items())
    checkpoint = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert (checkpoint / "model.safetensors").stat().st_size < 10_000
    assert (checkpoint / "adapter.safetensors").stat().st_size < 10_000
    model, adapter = adapted(seed=0)
    if case == "reentrant":
        model.enable_input_require_grads()
    trainer = trainer_of(model, adapter, tmp_path / "again", **OPTIONS[case])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same(trained_bits(adapter), expected)
    # And what is beside the Trainer's own files is the adapter as it was then.
    plain = bert(0)
    last = max((tmp_path / "again").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    slt.load(plain, last)
    inputs = {key: own for key, own in batch().items() if key != "labels"}
    bound = 1e-2 if case == "bf16" else 1e-5  # the Trainer leaves the model autocasting
    found, expected = (own.eval()(**inputs).logits for own in (plain, model))
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_trainer_loads_the_best(tmp_path):
    model, adapter = adapted()
    trainer = trainer_of(
        model,
        adapter,
        tmp_path,
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    found = trained_bits(adapter)
    card = (best / "README.md").read_text()
    assert f"| eval_loss | {trainer.state.best_metric:.6g} |" in card
    adapter.detach()
    again = slt.load(model, best)
    assert_same(trained_bits(again), found)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_a_trainer_saves_is_loaded(tmp_path, caplog):
    """Merged, a model is whole; with an adapter left in it, transformers says what it drops."""
    model, adapter = adapted(dropout=0.0)
    trainer_of(model, adapter, tmp_path / "run", epochs=1).train()
    inputs = {key: own for key, own in batch().items() if key != "labels"}
    expected = model.eval()(**inputs).logits
    adapter.alone_in_checkpoints = False
    model.save_pretrained(tmp_path / "unmerged")
    logging.getLogger("transformers").propagate = True
    try:
        other = type(model).from_pretrained(tmp_path / "unmerged")
    finally:
        logging.getLogger("transformers").propagate = False
    said = caplog.text
    assert "UNEXPECTED" in said
    assert "superlora" in said
    assert not torch.allclose(other.eval()(**inputs).logits, expected)
    adapter.merge()
    adapter.detach(keep_merged=True)
    assert not any("superlora" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**inputs).logits, expected)
    torch.testing.assert_close(model(**inputs).logits, expected)


def loop(accelerator, model, adapter, steps, first=0):
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-2, ratio=4))
    model, optimizer = accelerator.prepare(model, optimizer)
    yield model, optimizer
    model.train()
    for step in range(first, steps):
        torch.manual_seed(step)
        accelerator.backward(model(**batch()).loss)
        optimizer.step()
        optimizer.zero_grad()
        yield model, optimizer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_resumes_as_if_it_had_not_stopped(precision, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model, adapter = adapted()
    adapter.alone_in_checkpoints = True
    for step, _ in enumerate(loop(accelerator, model, adapter, 4)):
        if step == 2:
            accelerator.save_state(str(tmp_path))
    expected = trained_bits(adapter)
    assert (tmp_path / "model.safetensors").stat().st_size < 10_000
    accelerator.free_memory()
    model, adapter = adapted(seed=0)
    adapter.alone_in_checkpoints = True
    going = loop(accelerator, model, adapter, 4, first=2)
    next(going)
    accelerator.load_state(str(tmp_path))
    for _ in going:
        pass
    assert_same(trained_bits(adapter), expected)
    accelerator.free_memory()


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_as_if_it_had_not_stopped(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Adapted(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.adapter = adapted()
            self.adapter.alone_in_checkpoints = True
            self.own = nn.Parameter(torch.ones(1))

        def training_step(self, own, index):
            torch.manual_seed(self.global_step)
            return self.model(**own).loss * self.own

        def configure_optimizers(self):
            return torch.optim.SGD([*self.adapter.parameters(), self.own], lr=0.1)

    def fitted(epochs, **options):
        module = Adapted()
        loader = torch.utils.data.DataLoader(examples(), batch_size=8)
        trainer = lightning.Trainer(
            **{"max_epochs": epochs, "accelerator": "cpu", "logger": False, "devices": 1},
            **{"enable_progress_bar": False, "enable_model_summary": False},
            **{"enable_checkpointing": False},
        )
        trainer.fit(module, loader, **options)
        return module, trainer

    module, _ = fitted(2)
    expected = trained_bits(module.adapter)
    _, trainer = fitted(1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert "own" in held
    assert not any("embeddings" in name for name in held)
    module, _ = fitted(2, ckpt_path=str(tmp_path / "a.ckpt"))
    assert_same(trained_bits(module.adapter), expected)


def test_half_precision_with_a_scaler():
    model, adapter = adapted(dropout=0.0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch()).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(own.dtype == torch.float32 for own in adapter.parameters())


def test_a_state_dict_alone_is_loaded_strictly_and_a_whole_one_too():
    model, adapter = adapted()
    whole = copy.deepcopy(model.state_dict())
    adapter.alone_in_checkpoints = True
    alone = model.state_dict()
    assert len(alone) == len(list(adapter.parameters()))
    assert model.load_state_dict(alone, strict=True) == ([], [])
    assert model.load_state_dict(whole, strict=True) == ([], [])
    del whole["bert.embeddings.word_embeddings.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(whole)
    some = {name: own for name, own in alone.items() if "factor0" not in name}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(some)
    adapter.alone_in_checkpoints = False
    assert len(model.state_dict()) > len(alone)
    adapter.alone_in_checkpoints = True
    adapter.detach()
    assert "bert.embeddings.word_embeddings.weight" in model.state_dict()
    with pytest.raises(sl.AdapterError, match="must be attached to be alone"):
        adapter.alone_in_checkpoints = True


def test_several_adapters_are_alone_together():
    model, first = adapted()
    second = slt.attach(model, SPEC, ["key"], name="second")
    first.alone_in_checkpoints = second.alone_in_checkpoints = True
    state = model.state_dict()
    assert not any("embeddings" in name for name in state)
    assert {name.partition(".")[0] for name in state} == {"superlora", "second", "classifier"}
    assert model.load_state_dict(state, strict=True) == ([], [])
    first.alone_in_checkpoints = False
    assert not any("embeddings" in name for name in model.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_a_tied_head_is_trained_and_resumed(tmp_path):
    def made():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(
            **{"vocab_size": 32, "num_attention_heads": 2, "max_position_embeddings": 16},
            **{"tie_word_embeddings": True, "pad_token_id": 0},
            **sizes,
        )
        model = transformers.LlamaForCausalLM(config)
        also = ["embed_tokens", "lm_head"]
        return model, slt.attach(model, SPEC, ["q_proj"], also=also)

    model, adapter = made()
    trainer = trainer_of(model, adapter, tmp_path / "whole")
    trainer.train_dataset = [
        {"input_ids": own["input_ids"], "labels": own["input_ids"]} for own in examples()
    ]
    trainer.train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    first = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    other, again = made()
    resumed = trainer_of(other, again, tmp_path / "again")
    resumed.train_dataset = trainer.train_dataset
    resumed.train(resume_from_checkpoint=str(first))
    assert_same(trained_bits(again), trained_bits(adapter))


@pytest.mark.parametrize("script", ["loop_trainer", "loop_accelerate", "loop_lightning"])
@pytest.mark.slow
def test_scripts_run_and_go_on(script, tmp_path):
    if script == "loop_lightning":
        pytest.importorskip("lightning")
    for epochs in (1, 2):
        command = [sys.executable, str(ROOT / f"benchmarks/{script}.py"), "--tiny"]
        done = subprocess.run(
            [*command, "--output", str(tmp_path), "--epochs", str(epochs)],
            **{"capture_output": True, "text": True, "check": False},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "trained numbers" in done.stdout
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        design = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert design["format_version"] == 1
