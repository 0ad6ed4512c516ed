"""Which configuration of a supernet is in force, and how the one of a step is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy

from superlora.checks import check_count
from superlora.errors import AdapterError
from superlora.search.space import Configuration, Option, Space
from superlora.search.supernet_site import SupernetSite


class Choice:
    """The part of a supernet that chooses configurations."""

    space: Space
    name: str
    seed: int
    _configuration: Configuration | None = None
    _fixed = False
    _sites: dict[str, SupernetSite]

    @property
    def configuration(self) -> Configuration | None:
        """The configuration in force; None until one is chosen."""
        return self._configuration

    @property
    def fixed(self) -> bool:
        """Whether it was chosen by `use` or `using`, and not drawn."""
        return self._fixed

    def sample(self, step: int) -> Configuration:
        """Return the configuration of a training step, without choosing it.

        Parameters
        ----------
        step : int
            In [0, 2**64).

        Returns
        -------
        Configuration
            Uniform over the space; the same for the same seed, step and space.

        Raises
        ------
        TypeError
            If `step` is no integer.
        ValueError
            If it is out of that range.
        """
        if check_count("step", step, least=0) >= 1 << 64:
            raise ValueError(f"step must be below 2**64: got {step}")
        # Of another counter than the initial tensors, which take the seed's streams as well.
        philox = numpy.random.Philox(
            key=numpy.array([self.seed, step], dtype=numpy.uint64),
            counter=numpy.array([0, 0, 0, 1], dtype=numpy.uint64),
        )
        return self.space.sample(numpy.random.Generator(philox))

    def draw(self, step: int) -> Configuration:
        """Choose the configuration of a training step, until another one is chosen.

        Parameters
        ----------
        step : int
            In [0, 2**64); no two steps of a run should have the same.

        Returns
        -------
        Configuration
            What `sample` gives.

        Raises
        ------
        AdapterError
            If the supernet is on no model.
        """
        found = self.sample(step)
        self._check_attached()
        self._choose(found, fixed=False)
        return found

    def use(self, configuration: Configuration | None) -> None:
        """Choose a configuration, until another one is chosen.

        Parameters
        ----------
        configuration : Configuration or None
            One of the space; None to choose none.

        Raises
        ------
        AdapterError
            If the supernet is on no model.
        TypeError, ValueError
            If it is none of the space.
        """
        if configuration is not None:
            self.space.check(configuration)
            self._check_attached()
            # What is done to the caller's own afterwards must not pass unseen.
            configuration = {layer: dict(own) for layer, own in configuration.items()}
        self._choose(configuration, fixed=configuration is not None)

    @contextmanager
    def using(self, configuration: Configuration) -> Iterator[None]:
        """Choose a configuration inside a ``with`` block.

        Parameters
        ----------
        configuration : Configuration
            One of the space.

        Yields
        ------
        None
            Nothing.
        """
        before, fixed = self.configuration, self.fixed
        self.use(configuration)
        try:
            yield
        finally:
            self._choose(before, fixed=fixed)

    def _check_attached(self) -> None:
        if not self._sites:
            raise AdapterError(
                f"supernet {self.name!r} must be attached to be given a configuration: it was "
                "detached, or an adapter was extracted from it"
            )

    def _choose(self, configuration: Configuration | None, *, fixed: bool) -> None:
        self._configuration, self._fixed = configuration, fixed
        for site in self._sites.values():
            site.clear()

    def options(self, layer: str) -> Mapping[str, Option]:
        """Return the options of one layer in the configuration in force.

        Parameters
        ----------
        layer : str
            Its dotted name.

        Returns
        -------
        mapping of str to option
            By operation.

        Raises
        ------
        AdapterError
            If none was chosen.
        """
        if self.configuration is None:
            raise AdapterError(
                f"supernet {self.name!r} must have a configuration: call draw(step) at every "
                "training step, or use(configuration) to evaluate one"
            )
        return self.configuration[layer]
