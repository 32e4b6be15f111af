from server.cli.training_options import FLAGS, recipe_blocks, training_parameters
from server.finetune.recipe import Training
from server.finetune.recipe_methods import PEFT

NOT_OPTIONS = {"learning_rate_multiplier"}  # OpenAI's alternative to learning_rate


def test_every_field_of_every_recipe_is_an_option_once() -> None:
    fields = {name for kind in (Training, *PEFT.values()) for name in kind.__struct_fields__}
    names = [parameter.name for parameter in training_parameters()]
    assert sorted(names) == sorted(fields - NOT_OPTIONS)
    assert set(FLAGS) <= set(names)


def test_values_become_what_json_has_for_them() -> None:
    given = {"n_epochs": "3", "lora_dropout": "0.1", "target_modules": "q,k", "init_text": "12"}
    given |= {"r": "x", "learning_rate": "Infinity", "scheduler": "cosine"}
    peft = {"lora_dropout": 0.1, "target_modules": ["q", "k"], "init_text": "12"}
    peft |= {"r": "x", "learning_rate": "Infinity", "scheduler": "cosine"}
    made = recipe_blocks("lora", given | {"use_dora": True, "use_rslora": False, "biases": None})
    assert made["hyperparameters"] == {"n_epochs": 3}
    assert made["peft"] == {"type": "lora", "use_dora": True} | peft
    assert recipe_blocks("lora", {"target_modules": "all-linear"})["peft"]["target_modules"] == "all-linear"
