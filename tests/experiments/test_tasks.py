"""The tasks on models and data made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

torch = pytest.importorskip("torch")

from experiments.classification import Classification  # noqa: E402
from experiments.tasks import cifar, digits, texts  # noqa: E402

import superlora as sl  # noqa: E402
from superlora.demo.data import Images  # noqa: E402
from superlora.demo.train import Classifier  # noqa: E402
from superlora.demo.vit import VisionTransformer  # noqa: E402
from tests.demo.search_cases import make_images  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = sl.lora(rank=2)


def classification(**changes: Any) -> Classification:
    torch.manual_seed(0)
    base = VisionTransformer(16, 2, 2, 24, 14, 2).requires_grad_(False).eval()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    settings = {
        "epochs": 1,
        "batch_size": 20,
        "head_rate": 1e-3,
        "head_alone": 0.1,
        "head_epochs": 5,
    }
    return Classification(
        lambda classes: Classifier(base, classes, 28),
        make_images,
        ("query", "value"),
        **{**settings, **changes},
    )


def test_a_run_is_repeatable_and_leaves_the_model_as_it_was() -> None:
    task = classification()
    base = task.classifier(10).model
    before = {name: own.clone() for name, own in base.state_dict().items()}
    first = task.measure(LORA, rate=1e-2, scale=1.0, seed=0, test=True)
    again = task.measure(LORA, rate=1e-2, scale=1.0, seed=0, test=True)
    first.pop("seconds")
    again.pop("seconds")
    assert first == again
    assert first["parameters"] == 2 * 2 * 2 * 32  # two weights in two blocks, of width 16
    assert 0 <= first["test"] <= 1
    assert not first["diverged"]
    for name, own in base.state_dict().items():
        assert torch.equal(own, before[name])


@pytest.mark.parametrize("change", [{"rate": 1e-3}, {"scale": 4.0}, {"seed": 1}])
def test_rate_scale_and_seed_matter(change: dict[str, Any]) -> None:
    task = classification()
    own: dict[str, Any] = {"rate": 1e-2, "scale": 1.0, "seed": 0}
    sums = []
    for settings in (own, {**own, **change}):
        with task.trained(LORA, **settings) as trained:
            sums.append(
                sum(float(delta.detach().sum()) for delta in trained.adapter.deltas().values())
            )
    assert sums[0] != sums[1]


def test_every_design_starts_from_the_head_that_was_trained_alone() -> None:
    task = classification()
    with task.trained(None, rate=0.1, scale=1.0, seed=0) as alone:
        assert alone.adapter is None
        head = alone.classifier.head.weight.detach().clone()
    assert float(head.abs().sum()) > 0
    still = classification(frozen_head=True)
    with still.trained(LORA, rate=1e-2, scale=1.0, seed=0) as trained:
        assert torch.equal(trained.classifier.head.weight, head)
    moving = classification()
    with moving.trained(LORA, rate=0.0, scale=1.0, seed=0) as trained:
        assert not torch.equal(trained.classifier.head.weight, head)
    assert torch.equal(moving.head(0, 0.1)["weight"], head)  # what is kept has not moved


def test_a_training_above_a_guess_is_ended() -> None:
    # A head of far too large steps has a loss far above a guess on any machine.
    with classification(epochs=3, head_rate=1e3).trained(
        LORA, rate=1e-2, scale=1.0, seed=0
    ) as trained:
        assert trained.diverged
    with classification(epochs=3).trained(LORA, rate=1e-2, scale=1.0, seed=0) as trained:
        assert not trained.diverged


def test_texts_are_drawn_into_disjoint_parts() -> None:
    one, other = (Images(torch.arange(2 * n).reshape(n, 2), torch.arange(n)) for n in (100, 60))
    for pools in ([one], [one, other]):
        seeds = [texts.drawn(pools, (20, 10, 20), 100, "own", seed) for seed in (0, 1, 2, 100)]
        for own in seeds:
            parts = [set(part.labels.tolist()) for part in (own.train, own.validation)]
            assert [len(part) for part in parts] == [20, 10]
            assert not parts[0] & parts[1]
            if len(pools) == 1:  # no seed learns what another is tested with
                for tested in seeds:
                    assert not (parts[0] | parts[1]) & set(tested.test.labels.tolist())
        tested = [set(own.test.labels.tolist()) for own in seeds[:3]]
        assert len(set.union(*tested)) == 60
        assert not torch.equal(seeds[0].train.labels, seeds[1].train.labels)
    with pytest.raises(ValueError, match="must fit"):
        texts.drawn([one], (30, 20, 15), 100, "own", 0)


def test_digits_are_drawn_into_disjoint_parts() -> None:
    pixels = torch.arange(500).reshape(-1, 1, 1).to(torch.float32)
    every = Images(pixels, torch.arange(500) % 10)
    seeds = [digits.drawn(every, (50, 30, 100), seed) for seed in (0, 1, 2, 100)]
    tested = [set(own.test[torch.arange(100)].pixels.flatten().tolist()) for own in seeds[:3]]
    assert len(set.union(*tested)) == 300
    for own in seeds:
        learned = torch.cat([own.train.pixels, own.validation.pixels]).flatten().tolist()
        assert len(set(learned)) == 80
        assert not set(learned) & set.union(*tested)


def test_a_text_is_the_mean_of_its_own_tokens() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        **{"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32},
        **{"num_attention_heads": 2, "max_position_embeddings": 8},
    )
    model = transformers.BertModel(config).eval()
    classifier = texts.TextClassifier(model, 3)
    tokens = torch.tensor([[2, 5, 3, 0, 0, 0], [2, 5, 6, 3, 0, 0]])
    with torch.no_grad():
        found = classifier.features(tokens)
        alone = classifier.features(tokens[:1, :3])
        hidden = model(input_ids=tokens[:1, :3]).last_hidden_state.mean(1)
        rounded = texts.TextClassifier(model, 3, bfloat16=True).features(tokens)
    torch.testing.assert_close(found[:1], alone)
    torch.testing.assert_close(alone, hidden)
    assert not torch.equal(rounded, found)
    torch.testing.assert_close(rounded, found, rtol=0.0, atol=0.05)  # in float32 too


def write_cifar(folder: Path, data: str, count: int = 12) -> Any:
    classes, train, test, labels = cifar.FORMATS[data]
    generator = numpy.random.default_rng(0)
    folder.mkdir()
    for name in (*train, test):
        records = generator.integers(256, size=(count, labels + 3072), dtype=numpy.uint8)
        records[:, :labels] = generator.integers(min(classes, 20), size=(count, labels))
        records[0, labels - 1] = classes - 1
        records.tofile(folder / name)
    return records


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_cifar_is_read_as_it_is_published(tmp_path: Path, data: str) -> None:
    records = write_cifar(tmp_path / "own", data)
    train, test = cifar.read(tmp_path / "own", data)
    classes, files, _, labels = cifar.FORMATS[data]
    assert (len(train), len(test)) == (12 * len(files), 12)
    assert int(test.labels[0]) == classes - 1
    assert test.pixels.shape == (12, 3, 32, 32)
    # Red, green and blue planes, each by rows.
    assert int(test.pixels[3, 2, 1, 5]) == records[3, labels + 2 * 1024 + 32 + 5]


def test_broken_files_of_cifar_are_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path / "own", "cifar10")
    with pytest.raises(ValueError, match="must be one of"):
        cifar.read(tmp_path / "own", "cifar")
    with pytest.raises(ValueError, match=r"must have the file train\.bin"):
        cifar.read(tmp_path / "own", "cifar100")
    file = tmp_path / "own" / "test_batch.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="records of 3073 bytes"):
        cifar.read(tmp_path / "own", "cifar10")
    file.write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(ValueError, match="labels below 10: got 10"):
        cifar.read(tmp_path / "own", "cifar10")


def test_cifar_by_the_papers_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 32, "image_size": 32, "patch_size": 16},
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    write_cifar(tmp_path / "cifar", "cifar10")
    monkeypatch.delenv("SUPERLORA_CIFAR", raising=False)
    with pytest.raises(ValueError, match="SUPERLORA_CIFAR must name a folder"):
        cifar.load(data="cifar10")
    monkeypatch.setenv("SUPERLORA_CIFAR", str(tmp_path / "cifar"))
    monkeypatch.setenv("SUPERLORA_VIT", str(tmp_path / "vit"))
    task = cifar.load(data="cifar10", steps=4, batch_size=6, validation=10)
    found = task.measure(LORA, rate=0.05, scale=1.0, seed=0, test=True)
    assert found["parameters"] == 2 * 2 * 32
    assert 0 <= found["validation"] <= 1
    assert found["loss"] > 0
    head = task.measure(None, rate=0.05, scale=1.0, seed=0, test=True)
    assert head["parameters"] == 0
