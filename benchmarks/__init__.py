"""What a training step, a stream and a width cost, beside the peers and beside the machine's bounds.

`python -m benchmarks run` measures, prints tables and plots, and writes the measured sections of RESULTS.md.
Everything that is timed runs in a worker process (`workers/`), one for each environment; the scripts here only say
whose turn it is. See docs/performance.md.
"""
