"""The model card: what it says, what of it a person may write, and that it names no place on this machine."""

import json

import yaml
from huggingface_hub import ModelCard

from qriemann.folder.contents import read_folder
from qriemann.release.card import make_card, write_card
from tests.release.folders import adapter_folder, merged_folder


def block(card, language):
    return card.partition(f"```{language}\n")[2].partition("```")[0]


def test_the_card_of_peft_is_replaced_by_one_whose_metadata_the_hub_reads(run_folder):
    assert "More Information Needed" in (run_folder / "README.md").read_text()
    write_card(read_folder(run_folder))
    card = ModelCard.load(run_folder / "README.md")
    assert card.data.base_model == "someone/base"
    assert card.data.library_name == "peft"
    assert {"qriemann", "lora", "riemannion"} <= set(card.data.tags)
    assert "More Information Needed" not in card.text
    assert "(loss.png)" in card.text
    assert "| held-out loss (nats a token) | 3.5 | 1.25 |" in card.text


def test_the_recipe_in_the_card_is_read_by_the_trainer_and_gives_the_settings_that_were_written(run_folder):
    from qriemann.config import settings_from

    recipe = yaml.safe_load(block(make_card(read_folder(run_folder)), "yaml"))
    assert recipe == {
        "model_name_or_path": "someone/base",
        "learning_rate": 0.02,
        "max_steps": 5,
        "dataset_name": "YOUR_ROWS.jsonl",
    }
    settings = settings_from({**recipe, "output_dir": "out"})
    assert settings.trl["learning_rate"] == 0.02
    assert settings.model_name_or_path == "someone/base"


def test_what_a_person_wrote_into_the_card_stays_when_it_is_written_again(run_folder):
    write_card(read_folder(run_folder))
    path = run_folder / "README.md"
    text = path.read_text().replace("---\n\n<!-- begin", "---\n\nMy own words.\n\n<!-- begin")
    path.write_text(text.replace("library_name: peft", "library_name: peft\nlicense: mit\nlanguage: eo"))
    (run_folder / "run.json").write_text((run_folder / "run.json").read_text().replace("3.5", "7.5"))
    write_card(read_folder(run_folder))
    card = ModelCard.load(path)
    assert card.text.count("My own words.") == 1
    assert card.text.count("# base, fine-tuned") == 1
    assert "| 7.5 | 1.25 |" in card.text
    assert card.data.license == "mit"
    assert card.data.language == "eo"
    assert make_card(read_folder(run_folder), license={"license": "apache-2.0"}).count("license: mit") == 1


def test_a_card_that_a_person_wrote_alone_gets_ours_below(run_folder):
    (run_folder / "README.md").write_text("---\ntags: poems\n---\n# Poems\n\nWritten by me.\n")
    write_card(read_folder(run_folder))
    card = ModelCard.load(run_folder / "README.md")
    assert card.text.index("Written by me.") < card.text.index("begin: written by qriemann")
    assert card.data.tags[0] == "poems"
    assert "qriemann" in card.data.tags


def test_no_local_path_and_no_file_name_of_the_rows_folder_is_in_the_card(tmp_path):
    data = tmp_path / "secret-customer" / "rows.jsonl"
    base = tmp_path / "models" / "base"
    folder = adapter_folder(tmp_path / "adapter", base=str(base), settings={"dataset_name": str(data)})
    card = make_card(read_folder(folder))
    assert str(tmp_path) not in card
    assert "secret-customer" not in card
    recipe = yaml.safe_load(block(card, "yaml"))
    assert recipe["dataset_name"] == "rows.jsonl"
    assert recipe["model_name_or_path"] == "base"


def test_rows_from_the_hub_are_named_as_the_data(run_folder, tmp_path):
    folder = adapter_folder(tmp_path / "other", settings={"dataset_name": "someone/rows"})
    card = make_card(read_folder(folder))
    assert "datasets:\n- someone/rows\n" in card
    assert yaml.safe_load(block(card, "yaml"))["dataset_name"] == "someone/rows"
    assert "not published" not in card


def test_the_card_of_a_merged_model_has_the_proof(tmp_path):
    card = make_card(read_folder(merged_folder(tmp_path / "merged")))
    assert "library_name: transformers" in card
    assert "base_model_relation: finetune" in card
    assert "| nf4-dequantized, fp32 | 3.3e-09 | 4.0e-07 | 100.0 % | 1.500 (+0.000) |  | accepted |" in card
    assert "| untrained base | 7.0e-01 |" in card
    assert "prefer nf4-dequantized" in card


def test_an_answer_cannot_break_out_of_its_cell(run_folder):
    sample = {"question": "a | b", "right": "x", "before": "<script>\nline", "after": "ok"}
    (run_folder / "quickstart.json").write_text(json.dumps({"samples": [sample]}))
    card = make_card(read_folder(run_folder))
    assert r"| a \| b | x | &lt;script><br>line | ok |" in card
