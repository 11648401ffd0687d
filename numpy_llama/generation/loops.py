"""The endless loops of small models: "A lone soul, a lone soul, a lone soul, ..."."""

from collections.abc import Sequence

# Tables, code and lists repeat themselves too, so a loop is long: 256 ids are about 200 words.
LONGEST_PERIOD = 128
LEAST_TIMES = 8
LEAST_IDS = 256


def repeated_ids(ids: Sequence[int]) -> int:
    """The number of last ids that only repeat what comes before them; 0 if there is no loop.

    It is n - p for the least p <= 128 with ids[i] = ids[i - p] in the last n = max(256, 8 p) ids. Most p fail
    at the last id, so a token costs about 10 us.
    """
    for p in range(1, min(LONGEST_PERIOD, len(ids) - 1) + 1):
        if ids[-1] == ids[-1 - p]:
            n = max(LEAST_IDS, LEAST_TIMES * p)
            if n <= len(ids) and ids[-n:-p] == ids[p - n :]:
                return n - p
    return 0
