"""Play worlds by hand: many, or one with all that happened in it.

python -m tests.simulation --seeds 5000 [--first 1000]
python -m tests.simulation --seed 123 [--cut-at 57 | --every-cut]
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections import Counter

from tests.simulation.world import make_world, play


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=500, help="how many worlds")
    parser.add_argument("--first", type=int, default=0, help="the first one's seed")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--cut-at", type=int, help="a client is cut off at this await point")
    parser.add_argument("--every-cut", action="store_true", help="at each in turn")
    args = parser.parse_args()
    if args.seed is None:
        logging.disable()
    seeds = range(args.first, args.first + args.seeds) if args.seed is None else [args.seed]
    if args.seed is not None:
        print(make_world(args.seed))
    started, num_failed, happened = time.monotonic(), 0, Counter[str]()
    for seed in seeds:
        try:
            run = play(seed, args.cut_at)
            happened.update(run.happened())
            for cut_at in range(1, run.points.num_seen + 1) if args.every_cut else ():
                happened.update(play(seed, cut_at).happened())
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            num_failed += 1
            traceback.print_exc(limit=None if args.seed is not None else -3)
    seconds = time.monotonic() - started
    print(*(f"{count:9,} {name}" for name, count in happened.items()), sep="\n")
    print(f"{len(seeds)} worlds, {num_failed} failed, {seconds:.1f} s")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
