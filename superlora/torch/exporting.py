"""`Exporting`: an adapter's way into the files of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from superlora.torch.adapter import Adapter
    from superlora.torch.export import Export


class Exporting:
    """The methods of `Adapter` that write for PEFT and LyCORIS."""

    def to_peft(
        self, directory: str | Path, *, rank: int | None = None, energy: float | None = None
    ) -> Export:
        """Write a folder that ``peft.PeftModel.from_pretrained`` loads.

        Parameters
        ----------
        directory : str or pathlib.Path
            The folder; made if there is none.
        rank : int, optional
            Where PEFT has no exact counterpart, the rank of the LoRA that is nearest.
        energy : float, optional
            Instead, or besides: keep the least rank with this part, in (0, 1], of the sum of
            squares of the update's singular values.

        Returns
        -------
        Export
            The format of every layer, and its relative error; printed it is a table.

        Raises
        ------
        AdapterError
            If the adapter is not attached.
        NotADirectoryError
            If `directory` is a file.
        ValueError
            If an update needs a rank or an energy and none is given.

        Notes
        -----
        LoRA, LoKr and LoHa are written as what they are. Any other update whose fold
        is aligned has two thin factors, which are a LoRA of their inner width exactly; with a
        rank or an energy it is truncated by its singular values.
        """
        from superlora.torch.to_peft import save_peft

        return save_peft(cast("Adapter", self), Path(directory), rank, energy)

    def to_lycoris(
        self,
        path: str | Path,
        *,
        rank: int | None = None,
        energy: float | None = None,
        prefix: str = "lycoris",
    ) -> Export:
        """Write a safetensors file that LyCORIS loads.

        Parameters
        ----------
        path : str or pathlib.Path
            The file; replaced if it exists.
        rank : int, optional
            Where LyCORIS has no exact counterpart, the rank of the LoRA that is nearest.
        energy : float, optional
            Instead, or besides: keep the least rank with this part, in (0, 1], of the sum of
            squares of the update's singular values.
        prefix : str
            What the keys begin with, before the layer's name with underscores.

        Returns
        -------
        Export
            The format of every layer, and its relative error; printed it is a table.

        Raises
        ------
        AdapterError
            If the adapter is not attached, or has replaced parameters that LyCORIS cannot hold.
        ValueError
            If an update needs a rank or an energy and none is given, or a layer is
            none of LyCORIS's, or has another's name once its dots are underscores.
        """
        from superlora.torch.lycoris import save_lycoris

        return save_lycoris(cast("Adapter", self), Path(path), rank, energy, prefix)
