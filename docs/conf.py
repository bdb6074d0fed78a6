"""Sphinx: Markdown pages by MyST, the reference from the docstrings by autodoc."""

import re
from collections.abc import Iterator

import click
from docutils import nodes
from docutils.statemachine import StringList
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

import distinfluence
from distinfluence.cli import main as command_line

project = "distinfluence"
author = "the distinfluence developers"
copyright = "the distinfluence developers"
version = release = distinfluence.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "truth/*"]  # tables that truth.md includes
nitpicky = True
# types of third parties, and of modules that are private though a signature names them; public names must be found
nitpick_ignore_regex = [
    ("py:class", r"(?!distinfluence\.((curvature|errors|evaluate|influence|scaling|solvers|store|testing)\.)?\w+$).*")
]
default_role = "code"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

napoleon_numpy_docstring = False
napoleon_use_ivar = True

autoclass_content = "class"
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

html_theme = "furo"
html_math_renderer = "mathml"  # browsers draw it by themselves, also without a network
html_title = f"distinfluence {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False


def _escape_markup(_app: Sphinx, _kind: str, _name: str, _what: object, _options: object, lines: list[str]) -> None:
    """Keep `*args`, `|x|` and `name_` in a docstring from being read as reStructuredText; `code` stays code."""
    parts = re.split(r"(`[^`]*`|^ *>>>.*$)", "\n".join(lines), flags=re.MULTILINE)
    for i in range(0, len(parts), 2):  # the odd ones are code
        joins_code = i > 0 and re.match(r"\w", parts[i])  # `row`s: without a break the code would not end
        parts[i] = ("\\ " if joins_code else "") + re.sub(r"[*|]|_(?!\w)", r"\\\g<0>", parts[i])
    lines[:] = "".join(parts).split("\n")


class Commands(SphinxDirective):
    """A table of every command's arguments and options, as the command line itself has them."""

    def run(self) -> list[nodes.Node]:
        """The table, from Markdown."""
        around = nodes.container()
        self.state.nested_parse(StringList(list(self._rows()), source="distinfluence --help"), 0, around)
        return around.children

    @staticmethod
    def _rows() -> Iterator[str]:
        yield from ("| | | |", "|---|---|---|")
        for name, command in command_line.commands.items():
            context = click.Context(command, info_name=name)
            usage = " ".join(command.collect_usage_pieces(context)[1:])
            yield f"| `{name}{f' {usage}' if usage else ''}` | | {command.get_short_help_str(200)} |"
            for option in command.params:
                record = option.get_help_record(context)
                if record is not None and record[1]:  # arguments are in the line of the command
                    yield f"| | `{record[0].replace('|', '/')}` | {record[1].replace('|', '/')} |"


def _drawn(formula: str, *, as_block: bool = False) -> str:
    """MathML of TeX; signs of norms as high as what stands between them, not as the line."""
    return re.sub("<mo([^>]*)>([‖|])</mo>", r'<mo\1 stretchy="false">\2</mo>', tex2mathml(formula, as_block=as_block))


def _inline_formula(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(f'<span class="math">{_drawn(node.astext())}</span>')
    raise nodes.SkipNode


def _formula(writer: HTML5Translator, node: nodes.math_block) -> None:
    formula = _drawn(node.astext().strip(), as_block=True)
    writer.body.append(f'<div class="math" style="overflow-x: auto; overflow-y: hidden">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connect the docstring filter, the table of commands and the formulas."""
    app.add_directive("commands", Commands)
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_formula, None))
    app.connect("autodoc-process-docstring", _escape_markup)
