"""The generated code is what the .proto file says."""

from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[2]


def test_generated_code_is_current(tmp_path: Path) -> None:
    source = ROOT / "proto" / "spieldose_proto"
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    arguments = [f"-Ispieldose_proto={source}", *outputs, "spieldose_proto/inference.proto"]
    assert protoc.main(["protoc", *arguments]) == 0
    made = sorted((tmp_path / "spieldose_proto").iterdir())
    assert [file.name for file in made] == [
        "inference_pb2.py",
        "inference_pb2.pyi",
        "inference_pb2_grpc.py",
    ]
    for file in made:
        assert file.read_text() == (source / file.name).read_text(), (
            f"run `make proto`: {file.name}"
        )
