"""Learning rates of parts, and the stages of LLaVA."""

import pytest
import torch

from cases import tiny, tiny_blip2
from hf_vlm import VlmLlavaForConditionalGeneration
from hf_vlm.training import STAGES, Stage, VlmTrainer, VlmTrainingArguments, apply_stage, stage_named
from hf_vlm.training.trainer import groups_by_rate


def llava(**options) -> VlmLlavaForConditionalGeneration:
    model = VlmLlavaForConditionalGeneration.from_parts(tiny.clip_model().vision_model, tiny_blip2.llm(), **options)
    return tiny.randomise(model)


def trained(model) -> set[str]:
    """The parts of a model that have something to train."""
    return {name.split("model.", 1)[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def arguments(folder, **options) -> VlmTrainingArguments:
    return VlmTrainingArguments(output_dir=str(folder), bf16="false", report_to="none", **options)


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if not stage.lora])
def test_a_stage_trains_its_parts_alone_and_freezes_the_others_in_eval_mode(name):
    model = apply_stage(llava(), stage_named(name)).train()
    assert trained(model) == set(STAGES[name].rates)
    assert model.model.projector.training
    assert model.model.language_model.training == ("language_model" in STAGES[name].rates)
    assert model.model.vision_model.training == ("vision_model" in STAGES[name].rates)


def test_a_stage_undoes_what_another_unfroze():
    model = apply_stage(llava(), stage_named("llava-1.6-instruct"))
    assert trained(apply_stage(model, stage_named("llava-1.5-align"))) == {"projector"}


def test_lora_trains_the_projector_in_full_and_nothing_of_the_tower():
    model = apply_stage(llava(), stage_named("llava-1.5-lora"))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or ".projector.modules_to_save." in name for name in names)
    assert any(".projector.modules_to_save." in name for name in names)
    assert any("lora_" in name for name in names)
    assert not any("vision_model" in name for name in names)


def test_lora_saved_and_loaded_gives_the_same_logits(tmp_path):
    from peft import PeftModel

    model = apply_stage(llava(), stage_named("llava-1.5-lora"))
    base = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    for _name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    inputs = {"input_ids": torch.tensor([[3, *[20] * 16, 5, 6]]), "pixel_values": tiny.pixels(1)}
    inputs["input_ids"][0, 1:17] = model.config.image_token_id
    model.eval()
    with torch.no_grad():
        wanted = model(**inputs).logits
    model.save_pretrained(tmp_path)
    fresh = llava()
    names = {name.replace(".base_layer", "").replace(".original_module", ""): t for name, t in base.items()}
    fresh.load_state_dict({name: t for name, t in names.items() if name in fresh.state_dict()})
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, wanted)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, wanted, atol=1e-5, rtol=1e-4)


def test_a_stage_with_another_rank_keeps_its_scale_and_all_else():
    stage = stage_named("llava-1.5-lora")
    smaller = stage.with_lora(r=16)
    assert smaller.lora == {"r": 16, "alpha": 32, "dropout": 0.05}
    assert smaller.rates == stage.rates
    ranks = {p.shape[0] for name, p in apply_stage(llava(), smaller).named_parameters() if "lora_A" in name}
    assert ranks == {16}
    assert stage.lora["r"] == 128
    with pytest.raises(ValueError, match=r"with LoRA, such as llava-1\.5-lora"):
        stage_named("llava-1.5-instruct").with_lora(r=16)
    for wrong in ({"r": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="a positive rank and a dropout from 0 to below 1"):
            stage.with_lora(**wrong)
    assert Stage(stage.rates, lora={"r": 4, "alpha": 8}).with_lora(r=2).lora == {"r": 2, "alpha": 4, "dropout": 0.0}
    assert stage.with_lora(dropout=0.0).lora == {"r": 128, "alpha": 256, "dropout": 0.0}
    assert stage_named("llava-1.5-instruct").with_lora() == stage_named("llava-1.5-instruct")


def test_unknown_stages_and_parts_are_refused():
    with pytest.raises(ValueError, match=r"no stage 'llava-2'"):
        stage_named("llava-2")
    with pytest.raises(ValueError, match="'tower' is not a part"):
        apply_stage(llava(), Stage({"tower": 1e-3}))
    with pytest.raises(ValueError, match="LoRA cannot train the image tower"):
        apply_stage(llava(), Stage({"vision_model": 1e-3}, lora={"r": 2, "alpha": 2}))
    for alone in ("projector", "language_model"):
        with pytest.raises(ValueError, match=f"trains projector and language_model, not {alone}"):
            apply_stage(llava(), Stage({alone: 1e-3}, lora={"r": 2, "alpha": 2}))


def test_other_rates_of_a_stage_leave_those_of_its_other_parts():
    stage = stage_named("llava-1.5-instruct")
    assert stage.with_rates({"projector": 1e-3}).rates == {"projector": 1e-3, "language_model": 2e-5}
    assert stage.with_rates(None) == stage
    with pytest.raises(ValueError, match="does not train 'vision_model', but projector, language_model"):
        stage.with_rates({"vision_model": 1e-3})


def test_muon_beside_the_rates_of_a_stage_is_refused(tmp_path):
    """Recipes give a stage's rates after the arguments were checked."""
    args = arguments(tmp_path, muon_learning_rate=0.1)
    args.learning_rates = dict(stage_named("llava-1.5-align").rates)
    with pytest.raises(ValueError, match="leave out muon_learning_rate"):
        VlmTrainer(apply_stage(llava(), stage_named("llava-1.5-align")), args).create_optimizer()


def test_each_part_has_its_rate_and_keeps_its_weight_decay(tmp_path):
    model = apply_stage(llava(), stage_named("llava-1.6-instruct"))
    rates = {"projector": 0.1, "vision_model": 0.01}
    trainer = VlmTrainer(model, arguments(tmp_path, learning_rates=rates, learning_rate=1.0, weight_decay=0.5))
    optimizer = trainer.create_optimizer()
    found = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(found) == len(parameters)
    for name, parameter in parameters:
        part = name.split(".")[1]
        assert found[parameter] == (rates.get(part, 1.0), 0.5 if parameter.ndim >= 2 else 0.0)


def test_a_step_moves_parts_by_their_rates(tmp_path):
    model = torch.nn.ModuleDict({"slow": torch.nn.Linear(2, 2), "fast": torch.nn.Linear(2, 2)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.param_groups = groups_by_rate(model, optimizer.param_groups, {"fast": 2.0})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, 2.0 if "fast" in name else 0.5))


def test_a_rate_of_nothing_is_refused(tmp_path):
    model = apply_stage(llava(), stage_named("llava-1.5-align"))
    trainer = VlmTrainer(model, arguments(tmp_path, learning_rates={"language_model": 0.1}))
    with pytest.raises(ValueError, match="nothing is trained in a module called language_model"):
        trainer.create_optimizer()
    with pytest.raises(ValueError, match="leave out muon_learning_rate"):
        arguments(tmp_path, learning_rates={"projector": 0.1}, muon_learning_rate=0.1)


def test_rates_can_be_given_as_json(tmp_path):
    assert arguments(tmp_path, learning_rates='{"projector": 0.1}').learning_rates == {"projector": 0.1}
