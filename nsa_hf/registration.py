"""Transformers' Auto classes know the sparse families as soon as nsa_hf and Transformers are imported, in any order.

Transformers keeps one table of its families, in `configuration_auto`, where `AutoConfig` looks a config's class up by
name when a model asks for it. A row for each sparse family is written into it: at once where the table is there
already, or else right after it was made. So `import nsa_hf` imports neither Transformers nor PyTorch, and a command
that needs neither, `nsa-hf --help` for one, does not wait for them.

(This module is imported before `nsa-hf` can catch a Ctrl-C: it imports next to nothing itself.)
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

PREFIX = "nsa_"
TABLE = "transformers.models.auto.configuration_auto"


def register(table: Any) -> None:
    """Names the config class of each sparse family in the table; `nsa_hf` makes the class when it is looked up.

    `AutoConfig.register` would need the classes now.
    """
    for model_type, config in list(table.CONFIG_MAPPING_NAMES.items()):
        if not model_type.startswith(PREFIX):
            sparse_type = PREFIX + model_type
            table.CONFIG_MAPPING_NAMES[sparse_type] = f"Nsa{config}"
            table.CONFIG_MAPPING._modules[table.model_type_to_module_name(sparse_type)] = sys.modules["nsa_hf"]


class RegistersWhenImported:
    """A finder of modules that leaves every import to the others; behind that of the table, it registers."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                if module.__name__ == TABLE:
                    register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_now_or_when_imported() -> None:
    """To be called by `import nsa_hf`, and again by each that imports it anew: a notebook, `importlib.reload`."""
    # by name: the class may be of an earlier import; two of them would ask each other without end
    earlier = [finder for finder in sys.meta_path if type(finder).__name__ == RegistersWhenImported.__name__]
    for finder in earlier:
        sys.meta_path.remove(finder)
    sys.meta_path.insert(0, RegistersWhenImported())
    if TABLE in sys.modules:
        # waits for another thread that is importing it
        register(import_module(TABLE))
