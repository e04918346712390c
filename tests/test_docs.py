"""What README and docs name is there, and the script in docs/ops.md runs."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

import sinkattn
from sinkattn import cli, reference

ROOT = Path(__file__).parent.parent
if not (ROOT / "csrc").exists():
    pytest.skip("this is no source tree", allow_module_level=True)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def scripts(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_are_there(page):
    """Scripts are Python, and what they take from sinkattn exists; so do the files that the text names."""
    names = {"sinkattn": sinkattn}
    for script in scripts(page):
        for node in ast.walk(ast.parse(script)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "sinkattn":
                names |= {x.name: getattr(importlib.import_module(node.module), x.name) for x in node.names}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                assert hasattr(names[node.value.id], node.attr), ast.unparse(node)
    for path in re.findall(r"`((?:bench|csrc|examples|kernels|sinkattn|tests)/[\w/.]+)`", page.read_text()):
        assert path.endswith(".so") or (ROOT / path).exists(), path


def test_options_of_the_command_line():
    options = {
        name
        for command in cli.typer.main.get_command(cli.app).commands.values()
        for option in command.params
        for name in option.opts
    }
    named = re.findall(
        r"--[a-z-]+", "\n".join(re.findall(r"^\| `.*|^sinkattn .*", (ROOT / "docs/cli.md").read_text(), re.M))
    )
    assert named and set(named) <= options


def test_the_kernels_alone():
    """The caches hold the 101 tokens, and the output of the last is the definition's."""
    (script,) = scripts(ROOT / "docs/ops.md")
    torch.manual_seed(0)
    found = {}
    exec(script, found)
    keys, values = found["k_cache"], found["v_cache"]
    q, k = (reference.rotate(found[name], *found["angles"](100, 1)[:, None, :, 0].unbind(-2)) for name in ("q", "k"))
    torch.testing.assert_close(keys[:, :, 100:101], k)
    group = q.shape[1] // keys.shape[1]
    keys, values = (x[:, :, :101].repeat_interleave(group, 1) for x in (keys, values))
    expected = torch.softmax(q @ keys.mT * found["dim"] ** -0.5, -1) @ values
    torch.testing.assert_close(found["out"], expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert found["lengths"].tolist() == [101, 101]
