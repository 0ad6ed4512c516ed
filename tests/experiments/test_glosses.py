"""Data to text: the readers, the split, the training and the scores, on what is made here."""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch
from experiments.entries import Entry, encoded
from experiments.experiment import experiment
from experiments.generation import Generation
from experiments.tasks import e2e, glosses

import superlora as sl

LICENCE = "  1 This software and database is being provided to you.  \n"
ROAD, LANE, HESSE = (
    "04096066 06 n 02 road 0 route 0 001 ~ 03640589 n 0000 | an open way; \"a long road\"  ",
    "03640589 06 n 01 country_lane 0 001 @ 04096066 n 0000 | a narrow way or road  ",
    "11048205 18 n 01 Hesse 0 001 @i 04096066 n 0000 | Swiss writer (1877-1962)  ",
)  # fmt: skip
EAGLE = 'name[The Eagle], area[riverside],"The Eagle is by the river."'
ROWS = [
    "mr,ref",
    f'"{EAGLE.partition(",")[0]}, area[riverside]","The Eagle is by the river."',
    '"name[Alimentum], food[Indian]","Alimentum serves Indian food."',
    '"name[The Eagle], area[riverside]","By the river, there is The Eagle."',
]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a GPT-2 of two layers of width 16, with a tokenizer of bytes."""
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    end = "<|endoftext|>"
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[end], initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator(ROWS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        **{"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 96},
        **{"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0},
    )
    model = GPT2LMHeadModel(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = torch.tensor([tokenizer("\n".join(ROWS))["input_ids"][:96]])
    for _ in range(10):  # to be better than guessing
        optimiser.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder in the format of the E2E NLG dataset."""
    folder = tmp_path / "e2e-dataset"
    folder.mkdir()
    for name in e2e.FILES:
        (folder / name).write_text("\n".join(ROWS) + "\n", "utf-8")
    return folder


SETTINGS: dict[str, Any] = {"tokens": 96, "epochs": 6, "batch_size": 2}


def task(data: Path, model: Path, **changes: Any) -> Generation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERLORA_E2E", str(data))
        patch.setenv("SUPERLORA_LM", str(model))
        return e2e.load(**{**SETTINGS, **changes})


# Readers


def test_nouns_are_read_with_their_hypernym_and_without_examples() -> None:
    found = glosses.nouns(LICENCE + "\n".join([LANE, ROAD, HESSE]) + "\n")
    assert found == [glosses.Noun(("country lane",), "road", "a narrow way or road")]
    assert found[0].entry == Entry("name[country lane], type[road]", ("a narrow way or road",))


@pytest.mark.parametrize(
    "line",
    [LANE.partition(" | ")[0], LANE.replace("n 01", "n 02"), LANE.replace("001 @", "002 @"), "x"],
)
def test_a_line_of_another_format_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2, must have an offset, names, pointers and a gl"):
        glosses.nouns(LICENCE + line + "\n")


def test_references_of_one_meaning_are_joined(data: Path) -> None:
    # As spreadsheets write it, with a mark at the beginning and upper case.
    (data / "x.csv").write_text("MR,Ref\n" + "\n".join(ROWS[1:]), "utf-8-sig")
    for name in ("trainset.csv", "x.csv"):
        assert e2e.read(data / name) == [
            Entry(
                "name[The Eagle], area[riverside]",
                ("The Eagle is by the river.", "By the river, there is The Eagle."),
            ),
            Entry("name[Alimentum], food[Indian]", ("Alimentum serves Indian food.",)),
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mr,text\na,b\n", r"must have the columns \['mr', 'ref'\]: got \['mr', 'text'\].*'ref'"),
        ("", r"must have the columns .*: got \[\]"),
        ("mr,ref\n", "must have one row or more: got none"),
        ("mr,ref\na,b\nc\n", "line 3, must have a text for mr and for ref: got 'c' and ''"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "devset.csv").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=f"devset.csv.*{message}"):
        e2e.read(tmp_path / "devset.csv")


def test_folders_counts_and_lengths_that_do_not_fit_are_refused(
    data: Path, language_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"SUPERLORA_E2E must .* of the E2E .* got no trainset.c"):
        task(tmp_path, language_model)
    with pytest.raises(ValueError, match=r"SUPERLORA_LM must .* of a causal .* no config.json"):
        task(data, tmp_path)
    with pytest.raises(ValueError, match=r"SUPERLORA_E2E must name a folder of .*: got none"):
        task("", language_model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens must be at least \d+ for trainset.csv: got 9"):
        task(data, language_model, tokens=9)
    with pytest.raises(ValueError, match=r"test must be in \[1, 2\], or None: got 3"):
        task(data, language_model, test=3).parts(0)
    assert len(task(data, language_model, train=1).parts(0).train) == 1


# The split


def test_no_name_and_no_gloss_is_in_two_parts() -> None:
    found = [
        glosses.Noun((f"n{i % 17}", f"N{i % 23}"), "kind", f"gloss {i % 19}") for i in range(300)
    ]
    parts = [
        glosses.drawn(found, (4, 3, 2), lambda entry: entry.texts != ("gloss 3",), seed)
        for seed in (0, 0, 1)
    ]
    assert parts[0] == parts[1] != parts[2]
    by_entry = {noun.entry: [] for noun in found}
    for noun in found:
        by_entry[noun.entry].append(noun.keys)
    for own in parts:
        entries = [*own.train, *own.validation, *own.test]
        assert [len(own.train), len(own.validation), len(own.test)] == [4, 3, 2]
        assert len({entry.meaning for entry in entries}) == 9
        assert len({entry.texts for entry in entries}) == 9
        assert ("gloss 3",) not in {entry.texts for entry in entries}
    with pytest.raises(ValueError, match=r"must be no more than .* at most \d+ in all, got \(99,"):
        glosses.drawn(found, (99, 3, 2), lambda entry: True, 0)


def test_all_names_of_a_synset_count() -> None:
    pair = [glosses.Noun(("a", "b"), "k", "one"), glosses.Noun(("c", "B"), "k", "two")]
    with pytest.raises(ValueError, match="at most 1 in all"):
        glosses.drawn(pair, (1, 1, 0), lambda entry: True, 0)


# Training


def test_the_loss_is_on_the_tokens_of_the_text_alone(data: Path, language_model: Path) -> None:
    own = task(data, language_model)
    pairs = encoded(own.tokenizer, own.parts(0).train)
    expected = []
    for meaning, text in pairs:
        assert own.tokenizer.decode(meaning).endswith("] ->")
        assert text[-1] == own.tokenizer.eos_token_id
        logits = own.model(torch.tensor([meaning + text])).logits[0].log_softmax(-1)
        expected += [-logits[len(meaning) + i - 1, token].item() for i, token in enumerate(text)]
    with torch.no_grad():
        assert own.losses(pairs).tolist() == pytest.approx(expected, rel=1e-4)
    loss = own.loss(own.parts(0).train)
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    own.bfloat16 = True
    assert own.loss(own.parts(0).train) != loss
    assert own.loss(own.parts(0).train) == pytest.approx(loss, rel=1e-2)


@pytest.mark.parametrize(
    ("design", "parameters"),
    [
        (sl.dense(), 2 * 2 * 16 * 16),
        (sl.lora(rank=2), 2 * 2 * 2 * (16 + 16)),
        (sl.Spec(rank=1, groups=1, fold="balanced"), 32 + 32),
    ],
    ids=["dense", "LoRA", "SuperLoRA"],
)
def test_designs_train_and_leave_the_model_as_it_was(
    data: Path, language_model: Path, design: sl.Spec, parameters: int
) -> None:
    own = task(data, language_model, dropout=0.1, weight_decay=0.01)
    before = own.measure(None, rate=0.0, scale=1.0, seed=0, test=True)
    weights = {name: value.clone() for name, value in own.model.state_dict().items()}
    found = own.measure(design, rate=3e-2, scale=1.0, seed=0, test=True)
    assert found["parameters"] == parameters
    assert found["test"] > before["test"] + 0.02
    assert not found["diverged"]
    assert found == {
        **own.measure(design, rate=3e-2, scale=1.0, seed=0, test=True),
        "seconds": found["seconds"],
    }
    after = own.model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert own.loss(own.parts(0).test) == pytest.approx(-before["test"])
    assert own.measure(None, rate=0.0, scale=1.0, seed=0, test=True) is before


def test_only_the_queries_and_values_of_a_joint_projection_change(
    data: Path, language_model: Path
) -> None:
    own = task(data, language_model)
    with own.attached(sl.dense(), 1.0, 0) as adapter:
        names = [name.partition(".attn.")[2] for name in adapter.plan.shapes]
    assert names == ["c_attn.q", "c_attn.v"] * 2


def test_a_training_that_diverges_ends_with_the_loss_of_guessing(
    data: Path, language_model: Path
) -> None:
    own = task(data, language_model)
    found = own.measure(sl.dense(), rate=1e30, scale=1.0, seed=0, test=True)
    assert found["diverged"]
    assert found["validation"] == -math.log(own.model.config.vocab_size)


def test_a_model_whose_logits_are_more_than_the_product_is_refused(
    data: Path, language_model: Path
) -> None:
    own = task(data, language_model)
    own.model.lm_head.register_forward_hook(lambda head, inputs, out: out)
    forward = own.model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out

    own.model.forward = scaled
    with pytest.raises(ValueError, match="model must give its output embedding's product"):
        Generation(own.model, own.tokenizer, own.parts, [], 1, 1)


def test_texts_of_a_batch_are_those_of_each_greedily(data: Path, language_model: Path) -> None:
    own = task(data, language_model)
    meanings = [entry.meaning for entry in own.parts(0).test]
    expected = []
    for meaning in meanings:
        tokens = own.tokenizer(f"{meaning} ->")["input_ids"]
        start = len(tokens)
        while len(tokens) < start + 8 and tokens[-1] != own.tokenizer.eos_token_id:
            tokens = [*tokens, int(own.model(torch.tensor([tokens])).logits[0, -1].argmax())]
        text = own.tokenizer.decode(tokens[start:], skip_special_tokens=True)
        expected.append(text.strip())
    assert own.texts(meanings, 8) == expected
    assert any(expected)


def test_generated_texts_are_scored_with_the_references_of_their_meaning(
    data: Path, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("nltk", "pycocoevalcap", "sacrebleu"):
        pytest.importorskip(package)
    own = task(data, language_model, generate=2, meteor=False, decoding={"num_beams": 2})
    entries = own.parts(0).test
    texts = own.texts([entry.meaning for entry in entries], 8)
    assert [type(text) for text in texts] == [str, str]
    right = {entry.meaning: entry.texts[-1] for entry in entries}
    monkeypatch.setattr(own, "texts", lambda meanings, longest: [right[own] for own in meanings])
    found = own.measure(None, rate=0.0, scale=1.0, seed=0, test=True)
    assert (found["bleu"], found["rouge_l"]) == pytest.approx((100, 100))
    assert {"nist", "cider"} < set(found)
    assert "meteor" not in found


def test_texts_are_not_generated_without_the_packages_that_score_them(
    data: Path, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "experiments.text_metrics", raising=False)
    monkeypatch.delattr(sys.modules["experiments"], "text_metrics", raising=False)
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r"generate must be 0 without the extra .*: got 1; "):
        task(data, language_model, generate=1)


def test_glosses_from_end_to_end(
    language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = [
        f"{i:08d} 06 n 01 thing_{i} 0 001 @ 00000000 n 0000 | what is thing number {i}  "
        for i in range(1, 20)
    ]
    root = "00000000 06 n 01 entity 0 000 | all  "
    (tmp_path / "data.noun").write_text("\n".join([LICENCE, root, *lines]) + "\n", "utf-8")
    monkeypatch.setattr(glosses, "wordnet_folder", lambda: tmp_path)
    load = functools.partial(AutoModelForCausalLM.from_pretrained, language_model)
    monkeypatch.setattr(glosses, "smollm", load)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    monkeypatch.setattr(glosses, "smollm_tokenizer", lambda: tokenizer)
    own = glosses.load(train=8, validation=4, test=4, targets=["c_attn"], **SETTINGS)
    before = own.measure(None, rate=0.0, scale=1.0, seed=0, test=True)
    found = own.measure(sl.lora(rank=1), rate=3e-2, scale=1.0, seed=0, test=True)
    assert found["test"] > before["test"]
    assert found["validation"] > before["validation"]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("glosses", {f"{i}.{p}": (s, 576) for i in range(30) for p, s in (("q", 576), ("v", 192))}),
        ("e2e", {f"{i}.{p}": (1024, 1024) for i in range(24) for p in "qv"}),
    ],
)
def test_the_sizes_of_the_methods(name: str, shapes: dict[str, tuple[int, int]]) -> None:
    designs = {method.name: method.design for method in experiment(name).methods}
    sizes = {key: sl.Plan(own, shapes).num_parameters for key, own in designs.items() if own}
    if name == "e2e":
        assert sizes["LoRA r4"] == 393_216  # the poster's 0.40 million
        assert round(sizes["SuperLoRA 2-D r8"] / 1e6, 2) in (0.11, 0.12)
        return
    for mine, rank in ((3, 1), (5, 2), (10, 4)):
        share = sizes[f"SuperLoRA 2-D r{mine}"] / sizes[f"LoRA r{rank}"]
        assert 0.3 < share < 0.4
