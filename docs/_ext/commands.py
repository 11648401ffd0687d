"""```{commands}``` lists every command of the command line, as its own --help says it."""

import os

from docutils import nodes
from docutils.parsers.rst import Directive


class Commands(Directive):
    def run(self):
        os.environ["COLUMNS"] = "88"  # argparse folds its lines at this width
        from numpy_llama.cli import VERBS, parser

        verbs = next(action for action in parser()._actions if action.dest not in ("help", "version"))
        made = []
        for verb in VERBS:
            name = verb.__name__.rpartition(".")[2]
            section = nodes.section(ids=[f"command-{name}"], names=[f"command-{name}"])
            section += nodes.title(name, name)
            shown = verbs.choices[name].format_help()
            section += nodes.literal_block(shown, shown, language="none")
            made.append(section)
        return made


def setup(app):
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
