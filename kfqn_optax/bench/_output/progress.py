"""Progress bars on stderr, so that what is piped from stdout is the tables alone."""

import rich.console
import rich.progress as bars


def progress_bars() -> bars.Progress:
    """With the time since a bar appeared, and an estimate of what is left of it."""
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left:"),
        bars.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
    )
