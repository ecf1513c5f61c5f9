"""The ``pyrformer`` command.

Installed as ``pyrformer.cli``: modules here import each other relatively, and of the rest only the public names of
``pyrformer``.
"""

from __future__ import annotations

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pyrformer", message="%(prog)s %(version)s")
def main() -> None:
    """Train and run transformers without PyTorch."""
