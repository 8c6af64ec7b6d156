"""``llmfast bench``: the benchmarks of a whole model."""

from __future__ import annotations

import typer

from .bench_decode import decode_command
from .bench_offline import latency_command, throughput_command
from .bench_serve import serve_command

bench_app = typer.Typer(no_args_is_help=True)
bench_app.command("decode")(decode_command)
bench_app.command("throughput")(throughput_command)
bench_app.command("latency")(latency_command)
bench_app.command("serve")(serve_command)
