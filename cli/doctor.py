"""``pyrformer doctor``: what works on this machine."""

from __future__ import annotations

import json

import click

from pyrformer.doctor import examine


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Say what works on this machine, and what is missing, one line each."""
    findings = examine()
    if as_json:
        click.echo(json.dumps({f.name: f.to_dict() for f in findings}))
        return
    for f in findings:
        click.echo(f"{f.name:10} {'' if f.ok else 'not available: '}{f.text}")
