"""Tasks of data to text: a frozen causal language model with an adapter, and texts to learn."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import superlora.torch as slt
from experiments.entries import Entry, Pair, Parts, batched, encoded

SOURCES = ("entries.py", "generation.py", "text_metrics.py")
PACKAGES = ("transformers", "tokenizers", "sacrebleu", "nltk", "pycocoevalcap")
EVALUATION_BATCH = 32  # texts
LARGEST_GRADIENT = 1.0  # Euclidean norm over the factors


@dataclass
class Generation:
    """A language model with its tokenizer, the parts of each seed, and how it is trained."""

    model: Any
    tokenizer: Any
    parts: Callable[[int], Parts]
    targets: Any  # as `superlora.torch.attach` takes them
    epochs: int
    batch_size: int
    warm_up: float = 0.1  # share of the steps in which the rate rises; then it falls to zero
    weight_decay: float = 0.0
    smoothing: float = 0.0  # of the labels
    dropout: float = 0.0  # of the inputs of the updates; the model's own are off
    bfloat16: bool = False  # the model computes in it
    generate: int = 0  # meaning representations of the test part
    decoding: Mapping[str, Any] = field(default_factory=dict)  # of `generate`; greedy where empty
    scores: Callable[[list[str], list[Sequence[str]]], dict[str, float]] | None = None
    untrained: dict[tuple[int, bool], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self.model.eval()
        tokens = torch.arange(2, device=self.model.device)[None]
        with torch.no_grad(), self.computing():
            if not torch.allclose(self.logits(tokens), self.model(tokens).logits, atol=1e-4):
                raise ValueError(
                    "model must give its output embedding's product with its last hidden states: "
                    f"got other logits of {type(self.model).__name__}"
                )

    def computing(self) -> torch.autocast:
        """Return the context in which the model computes; the factors stay float32."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16)

    def logits(self, tokens: Tensor, used: Tensor | None = None, at: Any = ...) -> Tensor:
        """Return the model's logits at some positions, without those at the others."""
        with self.computing():
            hidden = self.model.base_model(input_ids=tokens, attention_mask=used).last_hidden_state
            out: Tensor = self.model.get_output_embeddings()(hidden[at])
        return out

    def losses(self, pairs: Sequence[Pair], smoothing: float = 0.0) -> Tensor:
        """Return the cross entropy of every token of the texts."""
        tokens, used, wanted = (own.to(self.model.device) for own in batched(pairs))
        before = F.pad(wanted[:, 1:], (0, 1))  # what a token is predicted from
        logits = self.logits(tokens, used, before).float()
        return F.cross_entropy(logits, tokens[wanted], reduction="none", label_smoothing=smoothing)

    def measure(
        self, design: Any, *, rate: float, scale: float, seed: int, test: bool
    ) -> dict[str, Any]:
        if design is None and (seed, test) in self.untrained:
            return self.untrained[seed, test]
        parts = self.parts(seed)
        start = time.perf_counter()
        with self.attached(design, scale, seed) as adapter:
            train = encoded(self.tokenizer, parts.train)
            loss = None if design is None else self.fit(adapter, train, rate, seed)
            seconds = time.perf_counter() - start
            found = {
                "parameters": 0 if design is None else adapter.num_parameters,
                "validation": -self.loss(parts.validation),
                **({"test": -self.loss(parts.test)} if test else {}),
                "seconds": seconds,
                "diverged": loss is not None and not math.isfinite(loss),
            }
            if test and self.generate and self.scores is not None:
                asked = parts.test[: self.generate]
                longest = max(len(text) for _, text in train)
                found |= self.scores(
                    self.texts([entry.meaning for entry in asked], longest),
                    [entry.texts for entry in asked],
                )
        if design is None:
            self.untrained[seed, test] = found
        return found

    @contextmanager
    def attached(self, design: Any, scale: float, seed: int) -> Iterator[Any]:
        """Attach a design for as long as the context lasts; None attaches nothing."""
        if design is None:
            yield None
            return
        with warnings.catch_warnings():
            # A rank above what a weight's own size needs: the comparison shows that it is idle.
            warnings.simplefilter("ignore")
            adapter = slt.attach(
                self.model.base_model, design, self.targets, seed=seed, dropout=self.dropout
            )
        try:
            adapter.scale = scale * adapter.scale
            yield adapter
        finally:
            adapter.detach()

    def fit(self, adapter: slt.Adapter, pairs: list[Pair], rate: float, seed: int) -> float:
        """Train an adapter, and return the mean loss of the last epoch; not finite, it stops."""
        factors = list(adapter.parameters())
        optimiser = torch.optim.AdamW(factors, lr=rate, weight_decay=self.weight_decay)
        steps = self.epochs * math.ceil(len(pairs) / self.batch_size)
        rise = max(1, round(self.warm_up * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda done: min((done + 1) / rise, (steps - done) / max(1, steps - rise)),
        )
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of the dropout
        total = 0.0
        adapter.train()
        for _ in range(self.epochs):
            total = 0.0
            for index in torch.randperm(len(pairs), generator=generator).split(self.batch_size):
                loss = self.losses([pairs[i] for i in index.tolist()], self.smoothing).mean()
                if not torch.isfinite(loss):
                    adapter.eval()
                    return loss.item()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(factors, LARGEST_GRADIENT)
                optimiser.step()
                schedule.step()
                total += loss.item() * len(index)
        adapter.eval()
        return total / len(pairs)

    @torch.no_grad()
    def loss(self, entries: Sequence[Entry]) -> float:
        """Return the loss per token of entries' texts; above that of guessing, it is guessing's."""
        pairs = sorted(encoded(self.tokenizer, entries), key=lambda pair: len(pair[0] + pair[1]))
        total = 0.0
        for start in range(0, len(pairs), EVALUATION_BATCH):
            total += float(self.losses(pairs[start : start + EVALUATION_BATCH]).double().sum())
        loss = total / sum(len(text) for _, text in pairs)
        guessing = math.log(self.model.get_output_embeddings().weight.shape[0])
        return min(loss, guessing) if math.isfinite(loss) else guessing

    @torch.no_grad()
    def texts(self, meanings: Sequence[str], longest: int) -> list[str]:
        """Return the model's texts, of no more tokens than so many."""
        end = self.tokenizer.eos_token_id
        found = []
        for start in range(0, len(meanings), EVALUATION_BATCH):
            own = [Entry(meaning, ("",)) for meaning in meanings[start : start + EVALUATION_BATCH]]
            asked = [meaning for meaning, _ in encoded(self.tokenizer, own)]
            width = max(len(tokens) for tokens in asked)
            # What is generated follows each row's end, so that the rows end together.
            rows = [[end] * (width - len(tokens)) + tokens for tokens in asked]
            used = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in asked]
            with self.computing():
                made = self.model.generate(
                    input_ids=torch.tensor(rows, device=self.model.device),
                    attention_mask=torch.tensor(used, device=self.model.device),
                    **{"do_sample": False, "use_cache": True, "max_new_tokens": longest},
                    **{"eos_token_id": end, "pad_token_id": end, **self.decoding},
                )
            texts = self.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
            found += [text.strip() for text in texts]
        return found


def scorer(generate: int, meteor: bool) -> Callable[..., dict[str, float]] | None:
    """Return what scores generated texts, where any are; its packages are asked for only then."""
    if not generate:
        return None
    try:
        from experiments import text_metrics
    except ImportError as error:
        raise ImportError(
            f"generate must be 0 without the extra `experiments`: got {generate}; {error}"
        ) from error
    if not meteor:
        return text_metrics.scores
    from wordnet import wordnet_folder

    synonyms = text_metrics.Synonyms(wordnet_folder())
    return lambda generated, references: text_metrics.scores(generated, references, synonyms)
