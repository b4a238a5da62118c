"""The benchmark of a device's kernels: rows as data, each checked before it is timed.

timing.py       the time of one call, launch overhead and warm caches left out
row.py          a row: what to call, what to check it against, and its floor
attention_rows.py elementwise_rows.py cache_rows.py sampling_rows.py moe_rows.py adapter_rows.py
linear_rows.py stored_rows.py       the rows
peers.py        the same work by other libraries, where they are installed
measure.py      a row's results; errors are results too
worker.py       rows in a process that may die of them; `run.py` goes on with the next
interpreted.py  what Triton's interpreter needs for a rehearsal
table.py        terminal, markdown and JSON
"""
