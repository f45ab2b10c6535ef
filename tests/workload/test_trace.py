"""Trace files: what is read, and that every kind of bad value is named with its file, line and column."""

import gzip
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ooco_gym.errors import OocoError
from ooco_gym.workload import find_data, read_lengths, read_trace

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def write(path, text):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_small_file_by_hand(tmp_path, name):
    requests = read_trace(write(tmp_path / name, HEADER + "0.5,100,7\n2,200,1\n"))
    assert requests.arrival_s.tolist() == [0.5, 2.0]
    assert requests.prompt_tokens.tolist() == [100, 200]
    assert requests.output_tokens.tolist() == [7, 1]


def test_column_order_extra_columns_quotes_and_blank_lines_do_not_matter(tmp_path):
    text = '\ufeffoutput_tokens,user, arrival_s,prompt_tokens\n"3",ann,1.5,20\n\n4,bob,1.5,30.0\n'
    requests = read_trace(write(tmp_path / "t.csv", text))
    assert requests.arrival_s.tolist() == [1.5, 1.5]
    assert requests.prompt_tokens.tolist() == [20, 30]
    assert requests.output_tokens.tolist() == [3, 4]


def test_length_tables_need_no_arrivals(tmp_path):
    path = write(tmp_path / "l.csv", "prompt_tokens,output_tokens\n10,1\n20,2\n")
    prompt, output = read_lengths(path)
    assert (prompt.tolist(), output.tolist(), prompt.dtype) == ([10, 20], [1, 2], np.int32)
    with pytest.raises(OocoError, match=r"l\.csv: line 1: column arrival_s is missing"):
        read_trace(path)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ("0,1,1\nx,1,1\n", "line 3: arrival_s is 'x', it must be a number"),
        ("0,1,1\n\n\n1,abc,1\n", "line 5: prompt_tokens is 'abc', it must be a number"),
        ("0,1,1\n1,1\n", "line 3: output_tokens is empty"),
        ("0,,1\n", "line 2: prompt_tokens is empty"),
        ("nan,1,1\n", "line 2: arrival_s is nan, it must be finite"),
        ("0,inf,1\n", "line 2: prompt_tokens is inf, it must be finite"),
        ("-0.5,1,1\n", "line 2: arrival_s is -0.5, it must be at least 0"),
        ("0,1,1\n1,0,1\n", "line 3: prompt_tokens is 0, it must lie between 1 and 2147483647"),
        ("0,1,-3\n", "line 2: output_tokens is -3, it must lie between 1 and"),
        ("0,3000000000,1\n", "line 2: prompt_tokens is 3000000000, it must lie between"),
        ("0,1,1.5\n", "line 2: output_tokens is 1.5, it must be a whole number"),
        ("", "no rows below the header"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, named):
    path = write(tmp_path / "bad.csv", HEADER + rows)
    with pytest.raises(OocoError) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(OocoError, match=r"gone\.csv: no such file"):
        read_trace(tmp_path / "gone.csv")
    with pytest.raises(OocoError, match=r"empty\.csv: the file is empty"):
        read_trace(write(tmp_path / "empty.csv", ""))
    with pytest.raises(OocoError, match="column output_tokens is missing"):
        read_trace(write(tmp_path / "m.csv", "arrival_s,prompt_tokens\n0,1\n"))
    (tmp_path / "fake.csv.gz").write_text(HEADER + "0,1,1\n")
    with pytest.raises(OocoError, match=r"fake\.csv\.gz: cannot be read"):
        read_trace(tmp_path / "fake.csv.gz")
    (tmp_path / "binary.csv").write_bytes(HEADER.encode() + b"0,\xff\xfe,1\n")
    with pytest.raises(OocoError, match=r"binary\.csv: cannot be read"):
        read_trace(tmp_path / "binary.csv")


def test_unsorted_rows_are_sorted_with_a_warning_that_names_the_first(tmp_path):
    path = write(tmp_path / "late.csv", HEADER + "5,1,1\n\n2,2,2\n9,3,3\n3,4,4\n")
    with pytest.warns(UserWarning, match=r"late\.csv: line 4: arrival_s is below the row above"):
        requests = read_trace(path)
    assert requests.arrival_s.tolist() == [2, 3, 5, 9]
    assert requests.prompt_tokens.tolist() == [2, 4, 1, 3]


good_row = st.tuples(st.floats(0, 1e6), st.integers(1, 10**6), st.integers(1, 10**6))


@given(st.lists(good_row, min_size=1, max_size=20))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path, rows):
    rows.sort(key=lambda row: row[0])
    path = write(tmp_path / "t.csv", HEADER + "".join(f"{a!r},{p},{o}\n" for a, p, o in rows))
    requests = read_trace(path)
    assert requests.arrival_s.tolist() == [row[0] for row in rows]
    assert requests.prompt_tokens.tolist() == [row[1] for row in rows]
    assert requests.output_tokens.tolist() == [row[2] for row in rows]


@given(
    st.integers(1, 20),
    st.data(),
    st.sampled_from(["", "abc", "nan", "-inf", "-1", "1e400"]),
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_bad_value_anywhere_is_found(tmp_path, n, data, bad):
    row, column = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, 2))
    cells = [[str(i), "1", "1"] for i in range(n)]
    cells[row][column] = bad
    path = write(tmp_path / "t.csv", HEADER + "\n".join(",".join(line) for line in cells))
    with pytest.raises(OocoError) as caught:
        read_trace(path)
    assert f"line {row + 2}: {HEADER.strip().split(',')[column]} is" in str(caught.value)


def test_find_data_looks_where_it_says(tmp_path, monkeypatch):
    given_dir, env_dir = tmp_path / "given", tmp_path / "env"
    (given_dir / "traces").mkdir(parents=True)
    env_dir.mkdir()
    in_traces = write(given_dir / "traces" / "a.csv", HEADER)
    in_env = write(env_dir / "a.csv", HEADER)
    monkeypatch.setenv("OOCO_DATA", str(env_dir))
    monkeypatch.chdir(tmp_path)

    assert find_data("a.csv") == in_env
    assert find_data("a.csv", given_dir) == in_traces  # data_dir goes before OOCO_DATA
    assert find_data(str(in_traces)) == in_traces
    assert find_data("env/a.csv").resolve() == in_env  # relative to the current folder
    with pytest.raises(OocoError) as caught:
        find_data("b.csv", given_dir)
    for named in ("b.csv", str(given_dir), "traces", "OOCO_DATA", "data_dir="):
        assert named in str(caught.value)
    with pytest.raises(OocoError, match=r"/nowhere/b\.csv"):
        find_data("/nowhere/b.csv")


def data_or_skip(name):
    try:
        return find_data(name)
    except OocoError as error:
        pytest.skip(str(error))


def test_the_azure_conversation_trace():
    requests = read_trace(data_or_skip("azure-conv-2023.csv.gz"))
    assert len(requests) == 19366  # figures of data/traces/README.md
    assert requests.mean_rate_per_s == pytest.approx(5.53, abs=0.005)
    assert requests.mean_prompt_tokens == pytest.approx(1155, abs=0.5)
    assert requests.mean_output_tokens == pytest.approx(211, abs=0.5)


def test_the_largest_trace_is_read_in_seconds():
    path = data_or_skip("servegen-deepseek-r1-h00-12.csv.gz")
    start = time.perf_counter()
    requests = read_trace(path)
    assert len(requests) == 727_359
    assert time.perf_counter() - start < 5
