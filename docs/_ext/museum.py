"""```{bug} eps outside the root``` shows a bug of tests/museum/bugs.py: what was written, and its source."""

import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.errors import SphinxError

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "museum"))
from bugs import BUGS


class Bug(Directive):
    required_arguments, final_argument_whitespace = 1, True

    def run(self):
        (name,) = self.arguments
        found = [bug for bug in BUGS if bug.name == name]
        if not found:
            raise SphinxError(f"tests/museum/bugs.py has no {name!r}")
        (bug,) = found
        shown = "\n".join(
            [f"- {line}" for line in bug.before.strip("\n").splitlines()]
            + [f"+ {line}" for line in bug.after.strip("\n").splitlines()]
        )
        code = nodes.literal_block(shown, shown, language="diff")
        where = nodes.paragraph("", "", nodes.emphasis("", f"{bug.file}, as in {bug.source}"))
        return [code, where]


def setup(app):
    app.add_directive("bug", Bug)
    return {"parallel_read_safe": True}
