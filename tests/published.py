"""Published models that dtrain's own are compared with; a plugin of conftest.py."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch


@pytest.fixture(scope="module")
def published_vit() -> type[torch.nn.Module]:
    """vit_pytorch's own class.

    Its __init__ imports torchvision by way of other models; vit.py itself does not. So an empty package with the same
    folder stands in for it while vit.py is imported, and is removed afterwards.
    """
    spec = importlib.util.find_spec("vit_pytorch")
    assert spec is not None and spec.submodule_search_locations is not None
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vit_pytorch"}
    for name in before:
        del sys.modules[name]
    shell = types.ModuleType("vit_pytorch")
    shell.__path__ = list(spec.submodule_search_locations)
    sys.modules["vit_pytorch"] = shell
    try:
        return importlib.import_module("vit_pytorch.vit").ViT
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "vit_pytorch"]:
            del sys.modules[name]
        sys.modules.update(before)
