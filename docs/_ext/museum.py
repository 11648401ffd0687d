"""```{bug} NAME``` shows a bug of tests/museum/bugs.py; what it does, its content, is hidden until asked."""

import html
import sys
from pathlib import Path

from docutils import nodes
from sphinx.errors import SphinxError
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "museum"))
from bugs import BUGS


class Bug(SphinxDirective):
    required_arguments, final_argument_whitespace, has_content = 1, True, True

    def run(self):
        (name,) = self.arguments
        found = [bug for bug in BUGS if bug.name == name]
        if not found:
            raise SphinxError(f"tests/museum/bugs.py has no {name!r}")
        self.assert_has_content()
        (bug,) = found
        shown = "\n".join(
            [f"- {line}" for line in bug.before.strip("\n").splitlines()]
            + [f"+ {line}" for line in bug.after.strip("\n").splitlines()]
        )
        tests = " and ".join(bug.tests.split())
        return [
            nodes.literal_block(shown, shown, language="diff"),
            nodes.paragraph("", "", nodes.emphasis("", f"{bug.file}, after {bug.source}")),
            nodes.raw("", "<details><summary>What it does, and who notices</summary>", format="html"),
            *self.parse_content_to_nodes(),
            nodes.raw("", f"<p>Caught by <code>{html.escape(tests)}</code>.</p></details>", format="html"),
        ]


def setup(app):
    app.add_directive("bug", Bug)
    return {"parallel_read_safe": True}
