"""Small inputs, and the two ways of looking at what a reader did with them, for the tests of the readers."""

import base64
import json
import random

from data.quarantine import Quarantine

FRUIT = ["apple\n", "bîrne 🍐", "cherry\r\ncake"]


def tolerant(tmp_path, **options):
    return Quarantine(tmp_path / "bad", **{"max_bad_share": 1.0, **options})


def read(source, quarantine):
    return [tuple(document) for document in source.documents(quarantine)]


def kept(quarantine):
    """The quarantined records, and that the summary counts them."""
    records = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    assert sum(quarantine.summary()["bad"].values()) == len(records)
    return records


def lines_of(texts, field="text"):
    return "".join(json.dumps({"id": index, field: text}) + "\n" for index, text in enumerate(texts)).encode()


def noise(count):
    """Lines that compress badly, so that a cut stream still holds some of them."""
    generator = random.Random(0)
    return lines_of([base64.b64encode(generator.randbytes(300)).decode() for _ in range(count)])


def write_parquet(path, values, column="text", **options):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(values)), column: values}), path, **options)
    return path
