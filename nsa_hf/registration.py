"""Registers the sparse families with Transformers' Auto classes, whichever of the two packages is imported first.

`AutoConfig` finds the class of a config by the model's type, in a table of the module `configuration_auto`. A row for
each sparse family is added to that table: now, if the module has been imported, else as soon as it is. So `import
nsa_hf` imports neither Transformers nor PyTorch, and a command that needs neither (`nsa-hf --help`) need not wait.
PEFT's tables are waited for in the same way (adapters.py).

(`nsa-hf` cannot catch a Ctrl-C before this module is imported: it imports next to nothing itself.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import adapters

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

PREFIX = "nsa_"
TABLE = "transformers.models.auto.configuration_auto"


def register(table: Any) -> None:
    """Adds a row for each sparse family to the table: its model type, and the name of its config's class.

    The class itself is made by `nsa_hf` when it is looked up. (`AutoConfig.register` would need it now.)

    Args:
        table: the module `configuration_auto`.
    """
    for model_type, config in list(table.CONFIG_MAPPING_NAMES.items()):
        if not model_type.startswith(PREFIX):
            sparse_type = PREFIX + model_type
            table.CONFIG_MAPPING_NAMES[sparse_type] = f"Nsa{config}"
            table.CONFIG_MAPPING._modules[table.model_type_to_module_name(sparse_type)] = sys.modules["nsa_hf"]


# Modules of other packages, and what is called with each as soon as it has been imported.
AWAITED: dict[str, Callable[[Any], None]] = {
    TABLE: register,
    adapters.CONSTANTS: adapters.enter,
    adapters.TUNERS: adapters.enter,
}


class RegistersWhenImported:
    """A finder of modules that has the others find them; after one that is awaited has run, it registers."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in AWAITED:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                if module.__name__ == name:
                    AWAITED[name](module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_now_or_when_imported() -> None:
    """Called by every import of `nsa_hf`, also by one that imports it again (a notebook, `importlib.reload`)."""
    # found by name, since the class may be of an earlier import; two finders would ask each other without end
    earlier = [finder for finder in sys.meta_path if type(finder).__name__ == RegistersWhenImported.__name__]
    for finder in earlier:
        sys.meta_path.remove(finder)
    sys.meta_path.insert(0, RegistersWhenImported())
    for name, enter in AWAITED.items():
        if name in sys.modules:
            # waits for another thread that is importing it
            enter(import_module(name))
