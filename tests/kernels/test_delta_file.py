"""The delta file keeps what is written, and what is not one is refused with its typed error."""

import hashlib
import io
import json
import math
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels import delta_file
from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.delta_file import DeltaReader, read_delta, write_delta
from spieldose_kernels.delta_header import PARTS, read_header
from spieldose_kernels.errors import (
    BaseMismatch,
    DeltaError,
    MalformedDelta,
    ModuleMismatch,
    NotADelta,
    TruncatedDelta,
)

BASE = BaseSpec("base", "f" * 64, {"m": (4, 6), "other": (3, 5)})
FLOATS = (torch.bfloat16, torch.float32)
DTYPES = {
    **{"I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"F16": torch.float16, "F32": torch.float32, "F64": torch.float64},
}
INFO = AdapterInfo(
    base_model="some/base",
    base_fingerprint=BASE.fingerprint,
    method="spiel-ag",
    density=0.125,
    description="a disc, Glück",
    settings={"steps": "10"},
)
VALUES_LIE, ROW_STARTS_LIE = b'"data_offsets":[0,16]', b'"data_offsets":[16,36]'
# row 2 is empty: columns 1 3 | 1 | | 2
DELTA = SparseDelta.from_flat(
    torch.tensor([20, 1, 3, 7]), torch.tensor([4.0, 1.0, 2.0, 3.0]), shape=(4, 6)
)

# --- what is written is read -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_come_back_bit_for_bit_in_their_own_dtype(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    values = torch.tensor([0.1, -1e-30, 3e30, -0.0]).to(dtype)
    adapter = adapter_of(SparseDelta(DELTA.row_starts, DELTA.columns, values, 6))
    assert_same_delta(round_trip(tmp_path, adapter).modules["m"], adapter.modules["m"])


def test_provenance_comes_back(tmp_path: Path) -> None:
    assert round_trip(tmp_path, adapter_of(DELTA)).info == INFO


def test_every_module_comes_back_under_its_name(tmp_path: Path) -> None:
    other = SparseDelta.from_flat(torch.tensor([14]), torch.tensor([9.0]), shape=(3, 5))
    back = round_trip(tmp_path, Adapter(INFO, {"m": DELTA, "other": other}))
    assert set(back.modules) == {"m", "other"}
    assert_same_delta(back.modules["m"], DELTA)
    assert_same_delta(back.modules["other"], other)


def test_empty_rows_come_back(tmp_path: Path) -> None:
    delta = SparseDelta.from_flat(torch.tensor([13]), torch.tensor([2.0]), shape=(4, 6))
    back = round_trip(tmp_path, adapter_of(delta)).modules["m"]
    assert back.row_starts.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(back.dense(torch.float32), delta.dense(torch.float32))


def test_a_module_without_entries_comes_back(tmp_path: Path) -> None:
    empty = SparseDelta.from_flat(
        torch.tensor([], dtype=torch.int64), torch.tensor([]), shape=(4, 6)
    )
    back = round_trip(tmp_path, adapter_of(empty)).modules["m"]
    assert back.nnz == 0
    assert back.shape == (4, 6)


@pytest.mark.parametrize(
    ("width", "dtype"), [(65_535, torch.uint16), (65_536, torch.uint16), (65_537, torch.int32)]
)
def test_columns_are_as_narrow_as_the_width_allows(
    tmp_path: Path, width: int, dtype: torch.dtype
) -> None:
    last = torch.tensor([0, width - 1, 2 * width - 1])
    delta = SparseDelta.from_flat(last, torch.tensor([1.0, 2.0, 3.0]), shape=(2, width))
    path = written(tmp_path, adapter_of(delta))
    assert safetensors.torch.load_file(path)["m.columns"].dtype == dtype
    back = read_delta(path.read_bytes()).modules["m"]
    assert back.columns.tolist() == [0, width - 1, width - 1]
    assert back.row_starts.tolist() == [0, 2, 3]


def test_entries_lie_sorted_in_the_file_whatever_order_they_came_in(tmp_path: Path) -> None:
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    delta = SparseDelta.from_flat(shuffled, shuffled.float(), shape=(4, 6))
    stored = safetensors.torch.load_file(written(tmp_path, adapter_of(delta)))
    assert stored["m.columns"].tolist() == list(range(6)) * 4
    assert stored["m.values"].tolist() == list(range(24))


@pytest.mark.parametrize("length", range(0, 256, 8))
def test_a_good_file_is_read_whatever_byte_its_header_size_begins_with(
    tmp_path: Path, length: int
) -> None:
    info = AdapterInfo(
        base_model="b", base_fingerprint="f", method="m", density=0.1, description="x" * length
    )
    payload = written(tmp_path, Adapter(info, {"m": DELTA})).read_bytes()
    assert read_delta(payload).info.description == "x" * length


def test_a_chat_template_comes_back_and_is_no_part_of_other_files(tmp_path: Path) -> None:
    template = "{% for m in messages %}„{{ m['content'] }}“\n{% endfor %}"
    own = Adapter(replace(INFO, chat_template=template), {"m": DELTA})
    assert read_delta(written(tmp_path, own).read_bytes()).info.chat_template == template
    with safetensors.safe_open(written(tmp_path, Adapter(INFO, {"m": DELTA})), "pt") as file:
        assert "chat_template" not in file.metadata()


@settings(deadline=None)
@given(st.data())
def test_any_support_comes_back(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    chosen = sorted(data.draw(st.sets(st.integers(0, height * width - 1))))
    indices = torch.tensor(chosen, dtype=torch.int64)
    delta = SparseDelta.from_flat(indices, indices + 0.5, shape=(height, width))
    payload = encoded(adapter_of(delta))
    assert_same_delta(read_delta(payload).modules["m"], delta)


# --- writing is all or nothing -------------------------------------------------------------------


def test_writing_leaves_no_other_file(tmp_path: Path) -> None:
    path = written(tmp_path, adapter_of(DELTA))
    write_delta(path, adapter_of(DELTA))
    assert list(tmp_path.iterdir()) == [path]


def test_what_no_reader_would_accept_is_not_written(tmp_path: Path) -> None:
    tiny = {
        f"module{i}": SparseDelta.from_flat(torch.tensor([1]), torch.ones(1), shape=(4, 6))
        for i in range(1000)
    }
    with pytest.raises(DeltaError, match=r"header of \d+ bytes: expected a file of"):
        written(tmp_path, Adapter(INFO, tiny))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.4e38])  # infinite as bfloat16
def test_values_no_reader_accepts_are_not_written(tmp_path: Path, value: float) -> None:
    dense = torch.ones(4, 6)
    dense[2, 3] = value
    with pytest.raises(DeltaError, match="expected finite values, got NaN or infinity"):
        written(tmp_path, adapter_of(from_dense(dense)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_in_the_middle_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = written(tmp_path, adapter_of(DELTA))
    before = path.read_bytes()

    def crash(*_: object) -> None:
        assert path.read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(KeyboardInterrupt):
        write_delta(path, adapter_of(from_dense(torch.ones(4, 6))))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_are_on_disk_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for step in ("fsync", "replace"):
        monkeypatch.setattr(os, step, recorded(step, getattr(os, step), calls))
    written(tmp_path, adapter_of(DELTA))
    assert calls == ["fsync", "replace", "fsync"]  # the last one is the directory's


# --- what is no delta file at all ----------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_any_prefix_of_a_good_file_is_refused_as_truncated(data: st.DataObject) -> None:
    payload = good_payload()
    length = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(TruncatedDelta, match=r"\d+ bytes.*got \d+"):
        read_delta(payload[:length], BASE)


def test_a_cut_off_file_is_told_how_long_it_should_be() -> None:
    payload = good_payload()
    with pytest.raises(TruncatedDelta, match=f"{len(payload)} bytes, got {len(payload) - 1} bytes"):
        read_delta(payload[:-1], BASE)


def test_trailing_bytes_are_refused() -> None:
    payload = good_payload()
    with pytest.raises(MalformedDelta, match=f"{len(payload)} bytes, got {len(payload) + 1} bytes"):
        read_delta(payload + b"\0", BASE)


def test_a_zipped_torch_pickle_is_refused_unread(tmp_path: Path) -> None:
    torch.save({"m.values": torch.ones(3)}, tmp_path / "renamed.safetensors")
    assert "pickle" in refused(NotADelta, (tmp_path / "renamed.safetensors").read_bytes())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_is_refused_unread(protocol: int) -> None:
    payload = pickle.dumps({"weights": list(range(300))}, protocol=protocol)
    assert "pickle" in refused(NotADelta, payload)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        refused(NotADelta, pickle.dumps(Touch(canary), protocol=protocol))
    assert not canary.exists()


def test_text_is_refused_and_shown() -> None:
    assert "b'GGUF" in refused(NotADelta, b"GGUF and then a lot of other bytes")


def test_a_foreign_safetensors_file_is_refused() -> None:
    payload = safetensors.torch.save({"lora_A.weight": torch.ones(2, 2)})
    assert_names(refused(NotADelta, payload), "'spieldose.delta'", "None")


def test_another_tools_metadata_is_refused() -> None:
    payload = safetensors.torch.save({"w": torch.ones(2)}, metadata={"format": "pt"})
    assert_names(refused(NotADelta, payload), "'spieldose.delta'", "'pt'")


def test_another_format_version_is_refused() -> None:
    assert_names(refused(NotADelta, altered(metadata={"format_version": "2"})), "'1'", "'2'")


@pytest.mark.parametrize(
    "header",
    [
        "{not json",
        '{"m": []}',
        '{"m": {"data_offsets": [0]}}',
        '{"m": {"data_offsets": [0, "x"]}}',
        '{"m": {"data_offsets": [0, Infinity]}}',
        '{"m": {"data_offsets": [0, NaN]}}',
        '{"m": null}',
        '{"__metadata__": []}',
        '{"__metadata__": {}, "__metadata__": {}}',
        '{"m": 0, "m": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        '{"a":' * 4_000,
    ],
)
def test_a_header_that_is_no_safetensors_header_is_refused(header: str) -> None:
    assert "expected a safetensors header" in refused(NotADelta, with_header(header.encode()))


def test_a_long_header_before_little_data_is_refused_as_truncated_unread() -> None:
    header = b"{" + b" " * 100_000 + b"}"
    assert_names(refused(TruncatedDelta, with_header(header)), "100002 bytes", "got 100010")


def test_a_long_header_of_nothing_but_brackets_is_refused_unread() -> None:
    header = b'{"m": [' + b"[]," * 30_000 + b"0]}"
    message = refused(NotADelta, with_header(header, bytes(10 * len(header))))
    assert "too many brackets" in message


def test_names_that_cannot_be_printed_are_refused() -> None:
    header = b'{"\\ud800": {"data_offsets": [0, 0]}}'
    assert "UnicodeEncodeError" in refused(NotADelta, with_header(header))


def test_metadata_that_are_not_strings_are_refused() -> None:
    payload = with_header(b'{"__metadata__": {"format": 1}}')
    assert_names(refused(MalformedDelta, payload), "strings", "other values")


# --- what does not belong to the base ------------------------------------------------------------


def test_a_delta_of_another_base_is_refused() -> None:
    payload = altered(metadata={"base_fingerprint": "0123456789abcdef"})
    assert_names(refused(BaseMismatch, payload), "ffffffffffff (base)", "0123456789ab (some/base)")


def test_a_module_the_base_lacks_is_refused() -> None:
    payload = encoded(Adapter(INFO, {"m": DELTA, "n": copied(DELTA)}))
    assert_names(refused(ModuleMismatch, payload), "target module", "'n'")


@pytest.mark.parametrize("shape", [(4, 5), (5, 6), (6, 4)])
def test_a_module_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    delta = SparseDelta.from_flat(torch.tensor([0]), torch.ones(1), shape=shape)
    payload = encoded(adapter_of(delta))
    assert_names(refused(ModuleMismatch, payload), "m:", "[4, 6]", str(list(shape)))


def test_an_adapter_without_modules_is_refused() -> None:
    payload = encoded(Adapter(INFO, {}))
    assert_names(refused(ModuleMismatch, payload), "at least one module", "none")


def test_without_a_base_only_the_file_itself_is_checked() -> None:
    payload = altered(metadata={"base_fingerprint": "0123456789abcdef"})
    assert read_delta(payload).info.base_fingerprint == "0123456789abcdef"


# --- what contradicts itself ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["base_model", "base_fingerprint", "method", "density", "description", "settings", "modules"],
)
def test_a_missing_metadata_key_is_refused(key: str) -> None:
    assert_names(refused(MalformedDelta, altered(metadata={key: None})), f"'{key}'", "none")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("density", "much"),
        ("settings", '{"\\ud800": 0}'),
        ("settings", '{"a": "\\ud800"}'),
        ("settings", "[]"),
        ("settings", "{"),
        ("modules", "[]"),
        ("modules", '{"m": 3}'),
        ("modules", '{"m": [4, 6]}'),
        ("modules", '{"m": [4, 6, "x"]}'),
        ("modules", '{"m": [4, 6, null]}'),
        ("modules", '{"m": [4, 6, Infinity]}'),
        ("modules", '{"m": [4, 6, 4.0]}'),
        ("modules", '{"m": [4, 6, 3], "m": [4, 6, 4]}'),
        ("modules", '{"m": [4, 6, true]}'),
        ("modules", '{"m":' * 2_000),
    ],
)
def test_unreadable_metadata_are_refused(key: str, text: str) -> None:
    assert "expected readable metadata" in refused(MalformedDelta, altered(metadata={key: text}))


@pytest.mark.parametrize("text", ["nan", "inf", "-0.1", "1.1"])
def test_a_density_that_is_none_is_refused(text: str) -> None:
    payload = altered(metadata={"density": text})
    assert_names(refused(MalformedDelta, payload), "density from 0 to 1", text)


def test_half_a_character_in_the_description_is_refused() -> None:
    payload = with_tokens(b'"a disc, Gl\xc3\xbcck"', b'"\\ud800"')
    assert "UnicodeEncodeError" in refused(NotADelta, payload)


def test_what_a_file_says_is_told_in_one_line() -> None:
    model = "two\nlines\u2028or three" + 10_000 * "!"
    payload = altered(metadata={"base_fingerprint": "0", "base_model": model})
    message = refused(BaseMismatch, payload)
    assert_names(message, "two\\nlines\\u2028or three!!!")
    assert len(message) < 1100


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor_is_refused(part: str) -> None:
    payload = altered({f"m.{part}": None})
    assert_names(refused(MalformedDelta, payload), f"'m.{part}'", "none of that name")


@pytest.mark.parametrize("name", ["m.bias", "other.values", "m"])
def test_a_tensor_of_no_declared_module_is_refused(name: str) -> None:
    payload = altered({name: torch.ones(2)})
    assert_names(refused(MalformedDelta, payload), "only tensors of declared modules", f"'{name}'")


@pytest.mark.parametrize(
    ("part", "expected", "got"),
    [
        ("row_starts", "I32", "I64"),
        ("row_starts", "I32", "F32"),
        ("columns", "U16", "I32"),
        ("columns", "U16", "I16"),
        ("columns", "U16", "I64"),
        ("values", "BF16 or F32", "F16"),
        ("values", "BF16 or F32", "F64"),
        ("values", "BF16 or F32", "I32"),
    ],
)
def test_an_array_of_another_dtype_is_refused(part: str, expected: str, got: str) -> None:
    payload = altered({f"m.{part}": getattr(DELTA, part).to(DTYPES[got])})
    assert_names(refused(MalformedDelta, payload), f"m.{part}", expected, f"'{got}'")


def test_a_dtype_torch_does_not_know_is_refused() -> None:
    payload = good_payload()
    head = int.from_bytes(payload[:8], "little")
    header = payload[8 : 8 + head].replace(b'"dtype":"F32"', b'"dtype":"F99"')
    message = refused(MalformedDelta, with_header(header, payload[8 + head :]))
    assert_names(message, "m.values", "BF16 or F32", "'F99'")


def test_a_tensor_too_large_for_torch_is_refused() -> None:
    empty = from_dense(torch.zeros(4, 6))
    payload = encoded(adapter_of(empty))
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])
    header["m.values"]["shape"] = [0, 2**63]
    message = refused(MalformedDelta, with_header(json.dumps(header).encode(), payload[8 + size :]))
    assert_names(message, "m.values", "shape [0]", str(2**63))


@pytest.mark.parametrize("part", PARTS)
def test_an_array_of_another_length_is_refused(part: str) -> None:
    array = getattr(DELTA, part)
    payload = altered({f"m.{part}": array[:-1].clone()})
    length = array.numel()
    assert_names(refused(MalformedDelta, payload), f"m.{part}", f"[{length}]", f"[{length - 1}]")


def test_an_array_of_two_dimensions_is_refused() -> None:
    payload = altered({"m.values": DELTA.values[:, None].clone()})
    assert_names(refused(MalformedDelta, payload), "m.values", "[4]", "[4, 1]")


@pytest.mark.parametrize("shape", [b"[true]", b"[4.0]", b"[-4]", b"[4,1]", b"4", b"null"])
def test_a_shape_of_something_else_is_refused(shape: bytes) -> None:
    refused(DeltaError, with_tokens(b'"F32","shape":[4]', b'"F32","shape":' + shape))


@pytest.mark.parametrize("offsets", [b"[0]", b"[0,16,16]", b"[0,15]", b"[-16,0]", b"16", b"null"])
def test_offsets_that_are_not_the_arrays_are_refused(offsets: bytes) -> None:
    refused(DeltaError, with_tokens(VALUES_LIE, b'"data_offsets":' + offsets))


@pytest.mark.parametrize("offsets", [b"[0,20]", b"[12,32]", b"[20,40]"])
def test_arrays_that_overlap_are_refused(offsets: bytes) -> None:
    payload = with_tokens(ROW_STARTS_LIE, b'"data_offsets":' + offsets)
    assert "expected data from byte" in refused(MalformedDelta, payload)


def test_a_gap_between_arrays_is_refused() -> None:
    payload = good_payload()
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])
    last = max(
        (name for name in header if name != "__metadata__"),
        key=lambda name: header[name]["data_offsets"],
    )
    header[last]["data_offsets"] = [offset + 2 for offset in header[last]["data_offsets"]]
    moved = with_header(json.dumps(header).encode(), payload[8 + size :] + bytes(2))
    assert "expected data from byte" in refused(MalformedDelta, moved)


@pytest.mark.parametrize("declared", [3, 5, 0, -1])
def test_another_number_of_entries_than_declared_is_refused(declared: int) -> None:
    payload = altered(metadata={"modules": json.dumps({"m": [4, 6, declared]})})
    assert_names(refused(MalformedDelta, payload), f"[{declared}]", "[4]")


@pytest.mark.parametrize("shape", [[-1, 6], [0, 6], [1, -6], [1, 0], [1, 2**31 + 1]])
def test_a_shape_without_rows_or_columns_or_with_too_many_columns_is_refused(
    shape: list[int],
) -> None:
    height = max(shape[0] + 1, 0)
    tensors = {
        "m.row_starts": torch.zeros(height, dtype=torch.int32),
        "m.columns": DELTA.columns[:0].clone(),
        "m.values": DELTA.values[:0].clone(),
    }
    payload = altered(tensors, metadata={"modules": json.dumps({"m": [*shape, 0]})})
    assert_names(refused(MalformedDelta, payload, base=None), "positive shape", str(shape))


@pytest.mark.parametrize(
    ("row_starts", "got"),
    [
        ([1, 2, 3, 3, 4], "1 to 4"),
        ([-1, 2, 3, 3, 4], "-1 to 4"),
        ([0, 2, 3, 3, 3], "0 to 3"),
        ([0, 2, 3, 3, 5], "0 to 5"),
    ],
)
def test_row_starts_that_do_not_span_the_entries_are_refused(
    row_starts: list[int], got: str
) -> None:
    payload = altered({"m.row_starts": torch.tensor(row_starts, dtype=torch.int32)})
    assert_names(refused(MalformedDelta, payload), "m.row_starts", "0 to 4", got)


@pytest.mark.parametrize(
    "row_starts", [[0, 3, 2, 3, 4], [0, 2, 3, 9, 4], [0, -5, 3, 3, 4], [0, 2**31 - 1, -1, 3, 4]]
)
def test_descending_row_starts_are_refused(row_starts: list[int]) -> None:
    payload = altered({"m.row_starts": torch.tensor(row_starts, dtype=torch.int32)})
    assert_names(refused(MalformedDelta, payload), "m.row_starts", "ascending", "step back")


@pytest.mark.parametrize("column", [6, 7, 65_535])
def test_a_column_outside_the_layer_is_refused(column: int) -> None:
    payload = altered({"m.columns": columns([1, column, 1, 2])})
    assert_names(refused(MalformedDelta, payload), "m.columns", "below 6", f"got {column}")


def test_a_negative_column_is_refused() -> None:
    shape = (1, 65_537)
    delta = SparseDelta.from_flat(torch.tensor([5]), torch.ones(1), shape=shape)
    tensors, metadata = parts_of(encoded(adapter_of(delta)))
    tensors["m.columns"] = torch.tensor([-1], dtype=torch.int32)
    payload = safetensors.torch.save(tensors, metadata)
    assert_names(refused(MalformedDelta, payload, base=None), "below 65537", "got -1")


def test_a_repeated_position_is_refused() -> None:
    payload = altered({"m.columns": columns([1, 1, 1, 2])})
    assert_names(refused(MalformedDelta, payload), "m.columns", "strictly ascending", "repeat")


def test_unsorted_columns_are_refused() -> None:
    payload = altered({"m.columns": columns([3, 1, 1, 2])})
    assert_names(refused(MalformedDelta, payload), "m.columns", "strictly ascending", "step back")


def test_a_step_back_after_an_empty_row_is_no_fault() -> None:
    payload = altered({"m.columns": columns([1, 3, 5, 0])})
    assert read_delta(payload, BASE).modules["m"].columns.tolist() == [1, 3, 5, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_refused(value: float, dtype: torch.dtype) -> None:
    payload = altered({"m.values": torch.tensor([1.0, 2.0, value, 3.0], dtype=dtype)})
    assert_names(refused(MalformedDelta, payload), "m.values", "finite", "NaN or infinity")


def test_a_value_that_is_infinite_as_bfloat16_is_refused() -> None:
    largest = torch.tensor([1.0, 2.0, 3.3895314e38, 3.0])
    assert largest.bfloat16().isfinite().all()
    read_delta(altered({"m.values": largest}))
    payload = altered({"m.values": torch.tensor([1.0, 2.0, 3.4028235e38, 3.0])})
    assert_names(refused(MalformedDelta, payload), "m.values", "finite")


# --- piece by piece ------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 7), st.sets(st.integers(0, 59)), st.sampled_from(FLOATS))
def test_pieces_of_any_size_give_the_same_delta(
    entries: int, chosen: set[int], dtype: torch.dtype
) -> None:
    indices = torch.tensor(sorted(chosen), dtype=torch.int64)
    delta = SparseDelta.from_flat(indices, (indices + 0.5).to(dtype), shape=(10, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_file, "PIECE_BYTES", 4 * entries)
        assert_same_delta(read_delta(encoded(adapter_of(delta))).modules["m"], delta)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_repeat_is_found_wherever_a_piece_begins(
    monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(delta_file, "PIECE_BYTES", 4)  # two columns
    tensors, metadata = parts_of(encoded(adapter_of(from_dense(torch.ones(4, 6)))))
    repeated = tensors["m.columns"].tolist()
    repeated[at] = repeated[at - 1]
    payload = safetensors.torch.save(tensors | {"m.columns": columns(repeated)}, metadata)
    assert_names(refused(MalformedDelta, payload), "m.columns", "strictly ascending")


def test_the_digest_is_the_files() -> None:
    reader = DeltaReader(io.BytesIO(good_payload()))
    assert list(reader.pieces())
    assert reader.digest == hashlib.sha256(good_payload()).hexdigest()


def test_row_starts_that_change_meanwhile_are_refused() -> None:
    file = io.BytesIO(good_payload())
    reader = DeltaReader(file)
    file.seek(good_payload().index(DELTA.row_starts.numpy().tobytes()) + 4)
    file.write(b"\1")
    with pytest.raises(MalformedDelta, match="stays as it is"):
        list(reader.pieces())


def test_a_file_cut_off_meanwhile_is_refused() -> None:
    file = io.BytesIO(good_payload())
    reader = DeltaReader(file)
    file.truncate(len(good_payload()) - 1)
    with pytest.raises(TruncatedDelta, match=r"m.columns: expected 8 bytes, got 7"):
        list(reader.pieces())


# --- whatever the bytes --------------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(payload: bytes) -> None:
    refused(DeltaError, payload)


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_a_valid_adapter_or_a_refusal(changes: list[tuple[int, int]]) -> None:
    payload = bytearray(good_payload())
    for position, byte in changes:
        payload[position % len(payload)] = byte
    assert_valid_or_refused(bytes(payload))


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_a_changed_header_gives_a_valid_adapter_or_a_refusal(data: st.DataObject) -> None:
    payload = good_payload()
    size = int.from_bytes(payload[:8], "little")
    tokens = JSON_TOKEN.split(payload[8 : 8 + size])
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, len(tokens) // 2 - 1)) * 2 + 1  # odd places are tokens
        tokens[place] = data.draw(st.sampled_from(STRANGE_TOKENS))
    assert_valid_or_refused(with_header(b"".join(tokens), payload[8 + size :]))


JSON_TOKEN = re.compile(rb"(\"(?:[^\"\\]|\\.)*\"|-?[\d.]+)")  # a string or a number
STRANGE_TOKENS = [
    *(b"0", b"-1", b"5", b"1.5", b"1e999", b"Infinity", b"NaN", b"18446744073709551616"),
    *(b"null", b"true", b"[]", b"{}", b"[0,0]", b'"x"', b'""', b'"m.values"', b'"\\ud800"'),
    *(b'"{}"', b'"[]"', b'"{\\"m\\":[4,6,4]}"', b'"{\\"m\\":[1e999,6,4]}"', b'"F16"', b'"I32"'),
]


class Touch:
    """Create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def adapter_of(delta: SparseDelta) -> Adapter:
    return Adapter(INFO, {"m": delta})


def from_dense(weight: torch.Tensor) -> SparseDelta:
    positions = weight.flatten().nonzero()[:, 0]
    shape = (weight.shape[0], weight.shape[1])
    return SparseDelta.from_flat(positions, weight.flatten()[positions], shape=shape)


def written(directory: Path, adapter: Adapter) -> Path:
    path = directory / "disc.safetensors"
    write_delta(path, adapter)
    return path


def encoded(adapter: Adapter) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return written(Path(directory), adapter).read_bytes()


@cache
def good_payload() -> bytes:
    return encoded(adapter_of(DELTA))


def parts_of(payload: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return safetensors.torch.load(payload), dict(read_header(io.BytesIO(payload)).metadata)


def altered(
    tensors: Mapping[str, torch.Tensor | None] = MappingProxyType({}),
    *,
    metadata: Mapping[str, str | None] = MappingProxyType({}),
) -> bytes:
    """Return a good file with some tensors and metadata replaced, or left out where None."""
    old_tensors, old_metadata = parts_of(good_payload())
    kept = {k: v for k, v in {**old_tensors, **tensors}.items() if v is not None}
    told = {k: v for k, v in {**old_metadata, **metadata}.items() if v is not None}
    return safetensors.torch.save(kept, told)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def with_tokens(old: bytes, new: bytes) -> bytes:
    """Return a good file in whose header something is replaced."""
    payload = good_payload()
    size = int.from_bytes(payload[:8], "little")
    header = payload[8 : 8 + size]
    assert header.count(old) == 1
    return with_header(header.replace(old, new), payload[8 + size :])


def columns(indices: list[int]) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int32).to(torch.uint16)


def copied(delta: SparseDelta) -> SparseDelta:
    return SparseDelta(
        delta.row_starts.clone(), delta.columns.clone(), delta.values.clone(), delta.width
    )


def round_trip(directory: Path, adapter: Adapter) -> Adapter:
    return read_delta(written(directory, adapter).read_bytes())


def recorded(step: str, function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls.append(step)
        return function(*arguments)

    return call


def refused(error: type[DeltaError], payload: bytes, base: BaseSpec | None = BASE) -> str:
    with pytest.raises(error) as caught:
        read_delta(payload, base)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def assert_names(message: str, expected: str, *got: str) -> None:
    for words in (expected, *got):
        assert words in message


def assert_same_delta(got: SparseDelta, expected: SparseDelta) -> None:
    assert got.shape == expected.shape
    for part in PARTS:
        left, right = getattr(got, part), getattr(expected, part)
        assert left.dtype == right.dtype
        assert left.view(torch.uint8).tolist() == right.view(torch.uint8).tolist()


def assert_valid_or_refused(payload: bytes) -> None:
    for base in (BASE, None):
        try:
            adapter = read_delta(payload, base)
        except DeltaError:
            continue
        for delta in adapter.modules.values():
            assert_well_formed(delta)


def assert_well_formed(delta: SparseDelta) -> None:
    positions = (delta.rows() * delta.width + delta.columns.long()).tolist()
    assert positions == sorted(set(positions))
    assert all(0 <= column < delta.width for column in delta.columns.tolist())
    assert delta.dense(torch.float32).isfinite().all()
    assert delta.dense(torch.float32).count_nonzero() == delta.values.count_nonzero()
