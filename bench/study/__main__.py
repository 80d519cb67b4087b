"""``python -m bench.study list | run | report``: the same as ``gradclust study``."""

from gradclust_fast.study.command import main

if __name__ == "__main__":
    raise SystemExit(main())
