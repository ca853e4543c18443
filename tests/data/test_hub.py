import json
import sys
from types import ModuleType

import numpy as np
import pytest

from nerve.data.hub import hub_dataset, hub_images
from nerve.errors import ConfigError, DataError

ROWS = [{"content": f"row {i}", "id": i} for i in range(5)]


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """Replaces `datasets` by a module that serves `ROWS` and records how it is called."""
    calls = []

    def load_dataset(path, name=None, *, split=None, revision=None, streaming=False):
        calls.append(
            {"path": path, "name": name, "split": split, "revision": revision, "stream": streaming}
        )
        if path == "absent":
            raise FileNotFoundError("no such dataset")
        return iter(ROWS)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_the_first_rows_are_streamed_once_with_the_arguments_given(calls):
    corpus = hub_dataset(
        "org/set", n_documents=3, name="en", split="test", text_column="content", revision="abc"
    )
    assert calls == []
    for _ in range(2):
        assert [document.text for document in corpus.documents()] == ["row 0", "row 1", "row 2"]
    expected = {"path": "org/set", "name": "en", "split": "test", "revision": "abc", "stream": True}
    assert calls == [expected]


def test_the_request_names_the_contents_and_each_argument_changes_it(calls):
    base = {"path": "a", "n_documents": 3}
    changes = [{}, {"path": "b"}, {"n_documents": 4}, {"name": "en"}, {"split": "test"}]
    changes += [{"text_column": "content"}, {"revision": "abc"}]
    keys = [hub_dataset(**(base | change)).key for change in changes]
    assert len(set(keys)) == len(keys)
    assert hub_dataset(**base).key == keys[0]
    assert calls == []


def test_the_cache_of_a_folder_follows_its_files(calls, monkeypatch, tmp_path):
    """Its rows identify it, not the path, which may also exist in another working directory."""
    keys = []
    for content in ("alpha", "omega"):
        rows = [{"text": f"{content} {i}"} for i in range(3)]
        monkeypatch.setitem(globals(), "ROWS", rows)
        (tmp_path / content / "data").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / content)
        keys.append(hub_dataset("data", n_documents=3).key)
        assert hub_dataset("data", n_documents=3).key == keys[-1]
    assert keys[0] != keys[1]


def test_a_dataset_that_cannot_be_read_is_an_error_with_what_was_asked_for(calls):
    with pytest.raises(DataError, match=r"'absent'.*FileNotFoundError: no such dataset.*network"):
        list(hub_dataset("absent", n_documents=3).documents())


def test_a_missing_column_is_an_error_with_the_columns_that_there_are(calls):
    with pytest.raises(DataError, match="no text in 'text'; its columns are 'content', 'id'"):
        list(hub_dataset("a", n_documents=3).documents())


def test_without_the_package_the_error_tells_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'package datasets.*pip install .*"\.\[hub\]"'):
        list(hub_dataset("a", n_documents=3).documents())


def test_fewer_documents_than_splits_is_an_error():
    with pytest.raises(ConfigError, match="at least 2; got 1"):
        hub_dataset("a", n_documents=1)


def test_the_real_package_reads_a_folder_in_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("datasets")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    corpus = hub_dataset(str(folder), n_documents=4, text_column="content")
    assert [document.text for document in corpus.documents()] == [f"row {i}" for i in range(4)]


def test_images_of_the_hub_become_channels_first_with_their_labels(calls, monkeypatch):
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    rows = [{"img": image.tolist(), "fine_label": i} for i, image in enumerate(pixels)]
    monkeypatch.setitem(globals(), "ROWS", rows)
    images = hub_images("a", n_classes=2, image_column="img", label_column="fine_label")
    assert calls == []
    train, test = images.read()
    assert [call["split"] for call in calls] == ["train", "test"]
    np.testing.assert_array_equal(train.images, pixels.transpose(0, 3, 1, 2))
    assert test.labels.tolist() == [0, 1]


def test_images_without_the_columns_named_are_an_error_with_those_there_are(calls):
    with pytest.raises(DataError, match="column 'image'; its columns are 'content', 'id'"):
        hub_images("a", n_classes=2).read()


@pytest.mark.parametrize(
    "shapes", [[(4, 4), (4, 4)], [(4, 4, 3), (5, 4, 3)], [(4, 4, 4), (4, 4, 4)], [(4, 4, 3, 3)]]
)
def test_images_that_are_not_rgb_or_of_several_sizes_are_an_error_with_their_shapes(
    calls, monkeypatch, shapes
):
    rows = [{"image": np.zeros(shape).tolist(), "label": 0} for shape in shapes]
    monkeypatch.setitem(globals(), "ROWS", rows)
    with pytest.raises(DataError, match=r"must be RGB and of one size; 'a' has the shapes \(4, 4"):
        hub_images("a", n_classes=1).read()


@pytest.mark.parametrize("start", ["~", "."])
def test_a_folder_begins_at_home_or_where_it_was_given(tmp_path, monkeypatch, start):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    corpora = [
        hub_dataset(path, n_documents=2) for path in (f"{start}/rows", str(tmp_path / "rows"))
    ]
    monkeypatch.chdir("/")
    assert [corpus.request for corpus in corpora] == [None, None]
