"""The operation of this checkout and of another commit, called alike."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import polynl_mm.ops

ROOT = Path(__file__).resolve().parents[2]


class Core:
    """Both doors of an ops module, whichever way it takes its arguments.

    Args:
        ops (module): ``polynl_mm.ops`` of some commit.
    """

    def __init__(self, ops: ModuleType) -> None:
        """Keep the module; see the class."""
        self.ops = ops
        self.named = hasattr(ops, 'Params')

    def params(self, *tensors) -> tuple:
        """W1, W2, W3, alpha and beta as its functions take them."""
        return (self.ops.Params(*tensors),) if self.named else tensors

    def poly_nl(self, x, params: tuple, form: str = 'auto'):
        """The layer on X."""
        return self.ops.poly_nl(x, *params, form=form)

    def conv(self, a, b) -> tuple:
        """Weight and shift of a convolution as its functions take them."""
        return (self.ops.Conv(a, b),) if self.named else (a, b)

    def project(self, conv: tuple, params: tuple) -> tuple:
        """``params`` with the first two weights made those of H."""
        if self.named:
            return (self.ops.project(*conv, *params),)
        w1, w2, w3, alpha, beta = params
        w1, w2, b1, b2 = self.ops.project(*conv, w1, w2)
        return w1, w2, w3, alpha, beta, b1, b2

    def poly_nl_behind(
        self, h, conv: tuple, projected: tuple, form: str = 'auto'
    ):
        """The layer on X = A H + b, from H."""
        return self.ops.poly_nl_behind(h, *conv, *projected, form=form)

    def chosen(self, x, backward: bool) -> str:
        """The form that :meth:`poly_nl` takes of itself."""
        c, n = x.shape[1], x[0, 0].numel()
        if hasattr(self.ops, 'choose_form'):
            return self.ops.choose_form(n, c, backward, x.element_size())
        choice = self.ops.choice
        return choice.choose_for(x, choice.ON_X, None, c, backward).name


HERE = Core(polynl_mm.ops)


def extract(commit: str, folder: str) -> None:
    """Write the package as a commit of this repository has it.

    Raises:
        ValueError: There is no such commit, or no repository.
    """
    archive = subprocess.run(
        ['git', '-C', ROOT, 'archive', commit, 'polynl_mm'],
        capture_output=True,
    )
    if archive.returncode:
        raise ValueError(archive.stderr.decode().strip().splitlines()[-1])
    subprocess.run(
        ['tar', '-x', '-C', folder], input=archive.stdout, check=True
    )


@lru_cache
def core_in(folder: str) -> Core:
    """Import the operation that :func:`extract` has written to a folder."""
    package = Path(folder, 'polynl_mm', 'ops')
    rooms = [str(package)] if package.is_dir() else None
    file = package / '__init__.py' if rooms else package.with_suffix('.py')
    name = f'ops_in_{Path(folder).name}'
    spec = spec_from_file_location(
        name, file, submodule_search_locations=rooms
    )
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return Core(module)
