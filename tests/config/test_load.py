"""From YAML and command line to a checked Config: what composes, what is refused, and in which words."""

import dataclasses
import shutil

import pytest
import yaml

from nsa_train.config import load, schema
from nsa_train.config.load import CONFIG_DIR, GROUPS, config_from_tree, load_config, options, to_tree, to_yaml
from nsa_train.errors import ConfigError

OPTIONS = [f"{group}={name}" for group in GROUPS for name in options(group)]
# What an option needs beside it: rules between groups that the option alone breaks on purpose.
BESIDE = {
    "stages=comparison_32k": ["trainer.seq_len=8192", "trainer.batch_rows=8"],
    "data=files": ["data.paths=[train.jsonl]"],
    "stages=extend_32k": ["trainer.seq_len=8192", "trainer.batch_rows=8"],
    "stages=long_64k": ["trainer.seq_len=8192", "trainer.batch_rows=8", "trainer.steps=99999"],
}
SECTIONS = {f.name: f for f in dataclasses.fields(schema.Config) if f.name in GROUPS and f.name != "experiment"}
COMPLETE = {
    "model": "tiny", "attention": "nsa", "moe": "tiny", "data": "stdlib", "optim": "adamw", "schedule": "cosine",
    "parallel": "zero2", "trainer": "default", "stages": "single", "logging": "default", "profile": "none",
}  # fmt: skip


def refusal(*overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return str(caught.value)


def keys_of(group):
    return {f.name for f in dataclasses.fields(getattr(load_config(), group))}


def written(group, name):
    return yaml.safe_load((CONFIG_DIR / group / f"{name}.yaml").read_text())


def agrees(found, wanted):
    """Whether a table says at least what was written; its entries take the rest from their neighbours."""
    if isinstance(wanted, dict):
        return all(agrees(found[key], value) for key, value in wanted.items())
    return found == wanted


# What composes --------------------------------------------------------------------------------------------------------


def test_no_argument_is_the_tiny_nsa_run():
    config = load_config()
    assert (config.name, config.experiment, config.arm) == ("tiny-nsa", "tiny", "nsa")
    assert config.run_dir.parts[-1] == "tiny-nsa"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_is_legal(option):
    group, _, name = option.partition("=")
    config = load_config([option, *BESIDE.get(option, [])])
    assert config.problems() == []
    if group == "experiment":
        assert config.experiment == name
        assert config.name == f"{name}-nsa"
    else:
        section = to_tree(config)[group]
        changed_by_experiment = (yaml.safe_load((CONFIG_DIR / "experiment/tiny.yaml").read_text())).get(group, {})
        for key, value in written(group, name).items():
            if key != "defaults" and key not in changed_by_experiment and f"{group}.{key}" not in str(BESIDE):
                assert agrees(section[key], value), key


# Of each arm, the arm it is next to and the keys in which the two differ.
NEXT_TO = {
    "nsa": ("full", {"attention.branches", "attention.gate"}),
    "full_gated": ("full", {"attention.gate"}),
    "full_gated_wide": ("full_gated", {"moe.expert_width"}),
    "nsa_shared_kv": ("nsa", {"attention.shared_kv"}),
    "nsa_random": ("nsa", {"attention.selection"}),
    "nsa_no_slc": ("nsa", {"attention.branches"}),
    "nsa_no_win": ("nsa", {"attention.branches"}),
    "window": ("nsa", {"attention.branches"}),
}


@pytest.mark.parametrize("arm", NEXT_TO)
@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_takes_every_arm_and_arms_differ_in_named_keys_only(experiment, arm):
    neighbour, keys = NEXT_TO[arm]
    one, other = (load_config([f"experiment={experiment}", f"attention={name}"]) for name in (arm, neighbour))
    assert one.name == f"{experiment}-{arm}"
    a, b = to_tree(one), to_tree(other)
    assert {key for key in a if a[key] != b[key]} == {"arm", "name", *(key.split(".")[0] for key in keys)}
    assert {f"{s}.{k}" for s in ("attention", "moe") for k in a[s] if a[s][k] != b[s][k]} == keys


def test_every_arm_is_next_to_another():
    assert {"full", *NEXT_TO} == set(options("attention"))


def test_the_command_line_wins_over_the_experiment_and_the_experiment_over_the_group():
    assert written("trainer", "default")["seq_len"] != load_config().trainer.seq_len == 512
    config = load_config(["trainer.seq_len=256", "seed=7", "name=mine"])
    assert (config.trainer.seq_len, config.seed, config.name) == (256, 7, "mine")


def test_a_table_takes_the_place_of_the_one_that_is_there():
    assert len(load_config(["data=comparison"]).data.mixture) > 2
    assert load_config(["data=comparison", "data.mixture={}"]).data.mixture == {}
    words = ["data=comparison", "data.mixture.stdlib=3", "data.mixture={linux: 1}", "data.mixture.a=2"]
    assert load_config(words).data.mixture == {"linux": 1.0, "a": 2.0}
    one = "stages.parts={only: {tokens: null, seq_len: 512, mixture: {}, rope_factor: 1.0}}"
    assert [*load_config(["stages=extend_32k", one]).stages.parts] == ["only"]


def test_an_integer_is_taken_for_a_number_and_a_list_for_a_tuple():
    config = load_config(["optim.lr=1", "attention.branches=[full]", "logging.tags=[a,b]"])
    assert isinstance(config.optim.lr, float)
    assert config.attention.branches == ("full",)
    assert config.logging.tags == ("a", "b")


@pytest.mark.parametrize("option", ["experiment=tiny", "experiment=paper_27b", "attention=full", "schedule=wsd"])
def test_yaml_of_a_config_reads_back_equal(option):
    config = load_config([option])
    assert config_from_tree(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("group", COMPLETE)
def test_one_file_of_a_group_lists_every_key_and_the_others_only_what_differs(group):
    assert set(COMPLETE) == set(SECTIONS)
    keys = keys_of(group)
    assert set(written(group, COMPLETE[group])) == keys
    for name in options(group):
        if name != COMPLETE[group]:
            variant = written(group, name)
            assert "_self_" in variant["defaults"], name
            assert set(variant) - {"defaults"} < keys or len(keys) == 1, name


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("attention.windw=128", "attention.windw: no such key; did you mean window?"),
        ("sed=1", "sed: no such key; did you mean seed?"),
        ("trainer.seq_len=long", "trainer.seq_len='long' must be an integer"),
        ("trainer.seq_len=64.5", "trainer.seq_len=64.5 must be an integer"),
        ("trainer.steps=true", "trainer.steps=True must be an integer"),
        ("optim.lr=fast", "optim.lr='fast' must be a number"),
        ("optim.lr=nan", "optim.lr=nan must be a finite number"),
        ("optim.lr=inf", "optim.lr=inf must be a finite number"),
        ("model.norm_eps=1e400", "model.norm_eps=inf must be a finite number"),
        (f"optim.lr={10**400}", "must be a finite number"),
        (f"seed={'9' * 5000}", "the configuration does not compose"),
        ("parallel.timeout_s=999999999999", "parallel.timeout_s=999999999999 must be at most 31536000, a year"),
        ("attention.gate=1", "attention.gate=1 must be true or false"),
        ("attention.phi=mpl", "attention.phi='mpl' must be one of mlp, linear, gated_pool, mean; did you mean mlp?"),
        ("logging.tags=a", "logging.tags='a' must be a list"),
        ("model=5", "model=5: no such option"),
        ("seed=null", "seed=None must be an integer"),
        (
            "attention=nsaa",
            "attention=nsaa: no such option; did you mean nsa?; there are full, full_gated, full_gated_wide, nsa, ",
        ),
        ("experiment=big", "experiment=big: no such option; there are m, paper_27b, r1, r2, tiny"),
        ("arm=full", "'arm=full': arm follows from the groups; set attention= or experiment="),
        ("experiment.x=1", "'experiment.x=1': experiment.x follows from the groups"),
        ("data.paths=[a.txt]", "data.paths=['a.txt'] are not read by kind=stdlib; choose data=files"),
        ("data.take=5", "data.take=5 is for kind=hub and kind=recall, not kind=stdlib"),
        ("data.include=[a]", "data.include=['a'] is for kind=tree and kind=tar, not kind=stdlib"),
        ("data.root=/tmp/ä", "into quotes of their own, like \"data.root='/my texts/ä'\""),
        ("trainer.steps=1,2", "trainer.steps=1,2: a key has one value; write a list as [a,b]"),
        ("data.paths=a,b", "data.paths=a,b: a key has one value; write a list as [a,b]"),
        ("data.include=glob(*)", "data.include=glob(*): a key has one value"),
        ("+seed=1", "'+seed=1': only plain key=value is accepted"),
        ("~seed=1", "only plain key=value is accepted"),
        ("hydra.run.dir=x", "only plain key=value is accepted"),
        ("model@attention=tiny", "only plain key=value is accepted"),
        ("seed", "'seed' is no key=value"),
        ("name=${oc.env:HOME}", "${oc.env:HOME} is not allowed: recipes are data"),
        ("name=${ oc.env:HOME}", "is not allowed: recipes are data"),
        ("data.root='${oc.${logging.project}:HOME}'", "is not allowed: recipes are data"),
        ("logging.tags=['${seed}']", "${seed} is not allowed: recipes are data"),
        ("name=../mine", "name='../mine' may hold letters, digits and . _ - only"),
        ("name=.hidden", "name='.hidden' may hold letters, digits and . _ - only"),
        ("data.name=a/b", "data.name='a/b' may hold letters, digits and . _ - only"),
        ("data.paths=[../secret.txt]", "../secret.txt leaves data.root=."),
        ("data.heldout_paths=[/etc/passwd]", "/etc/passwd leaves data.root=."),
        ("data=files", "data.paths is empty"),
        ("seed=-1", "seed=-1 must not be negative"),
        ("model.heads=3", "model.heads=3 is not a multiple of kv_heads=2"),
        ("model.key_dim=33", "model.key_dim=33 must be even"),
        ("model.vocab=256", "model.vocab=256 leaves no room"),
        ("model.dense_layers=9", "model.dense_layers=9 must lie between 0 and layers=4"),
        ("attention.cmp_stride=3", "attention.cmp_stride=3 must divide cmp_block=8"),
        ("attention.slc_block=10", "attention.cmp_stride=4 must divide slc_block=10"),
        ("attention.slc_count=2", "attention.slc_count=2 is less than the forced blocks slc_init + slc_local = 3"),
        ("attention.window=0", "attention.window=0 must be positive"),
        ("attention.branches=[slc,win]", "attention.branches=[slc,win] is not trainable; use [full] or"),
        ("attention.gate=false", "attention.gate=false needs a single branch"),
        ("moe.top_k=9", "moe.top_k=9 must lie between 1 and experts=8"),
        ("optim.beta2=1", "optim.beta2=1.0 must lie in [0, 1)"),
        ("schedule.warmup_share=1", "schedule.warmup_share=1.0 must lie in [0, 1)"),
        ("profile.steps=150", "trainer.steps=150 are too few; use 161 or a lower profile.skip"),
        ("parallel.zero_stage=0", "parallel.zero_stage=0 must be 1, 2 or 3"),
        ("parallel.offload_params=cpu", "offload_params=cpu needs sharded weights: zero_stage=3, not 2"),
        ("parallel.offload_optimizer=nvme", "parallel.offload_optimizer='nvme' must be one of none, cpu"),
        (
            "parallel.deepspeed={zero_optimization: 1}",
            "parallel.deepspeed.zero_optimization=1 must be a table of DeepSpeed's keys",
        ),
        (
            "parallel.deepspeed={zero_optimization: {reduce_bucket_size: 0}}",
            "parallel.deepspeed.zero_optimization.reduce_bucket_size=0 must be a positive whole number",
        ),
        (
            "parallel.deepspeed={zero_optimization: {allgather_bucket_size: 201}}",
            "parallel.deepspeed.zero_optimization.allgather_bucket_size=201 must be an even whole number",
        ),
        (
            "parallel.deepspeed={zero_optimization: {stage3_module_granularity_threshold: 5000}}",
            "parallel.deepspeed.zero_optimization.stage3_module_granularity_threshold: no key that can be added",
        ),
        ("parallel.deepspeed.gradient_cliping=1", "parallel.deepspeed.gradient_cliping: no key that can be added"),
        ("parallel.deepspeed.gradient_clipping=1", "parallel.deepspeed.gradient_clipping=1: optim.clip decides this"),
        (
            "parallel.deepspeed={zero_optimization: {stage: 0}}",
            "parallel.deepspeed.zero_optimization.stage=0: parallel.zero_stage decides this",
        ),
        (
            "parallel.deepspeed={zero_optimization: {overlap_com: true}}",
            "parallel.deepspeed.zero_optimization.overlap_com: no key that can be added; here are overlap_comm,",
        ),
        (
            "parallel.deepspeed={zero_optimization: {overlap_comm: 1}}",
            "parallel.deepspeed.zero_optimization.overlap_comm=1 must be true or false",
        ),
        (
            "parallel.deepspeed={zero_optimization: {sub_group_size: -1}}",
            "parallel.deepspeed.zero_optimization.sub_group_size=-1 must be a whole number",
        ),
        ("trainer.seq_len=70000", "trainer.seq_len=70000 is beyond model.max_seq_len=65536"),
        ("trainer.recomputed=[]", "trainer.recomputed=[] must name attention, mlp or both, each once"),
        ("trainer.recomputed=[mlp,mlp]", "trainer.recomputed=[mlp,mlp] must name attention, mlp or both, each once"),
        ("trainer.recomputed=[mlp,router]", "trainer.recomputed=['mlp', 'router'] must be one of attention, mlp"),
        ("trainer.recomputed=mlp", "trainer.recomputed='mlp' must be a list"),
        ("trainer.seq_len=1", "trainer.seq_len=1 leaves nothing to predict"),
    ],
)
def test_a_mistake_is_refused_with_key_value_and_rule(override, words):
    assert words in refusal(override)


def test_a_wrong_number_of_steps_is_told_once():
    assert refusal("trainer.steps=-1").startswith("1 problem")


def test_all_problems_are_reported_at_once():
    text = refusal("moe.top_k=12", "attention.windw=128", "optim.lr=fast", "model.key_dim=7", "model.heads=0")
    for words in (
        "5 problems",
        "moe.top_k=12",
        "attention.windw",
        "optim.lr='fast'",
        "model.key_dim=7",
        "model.heads=0",
    ):
        assert words in text
    assert len(text.splitlines()) == 1 + 5


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["attention.backend=reference"], "attention.backend=reference"),
        (["trainer.dtype=fp32"], "trainer.dtype=fp32"),
        (["trainer.compile=true", "trainer.activation_checkpointing=true"],
         "trainer.compile=true, trainer.activation_checkpointing=true"),
        (["parallel=zero3", "parallel.offload_optimizer=cpu", "parallel.offload_params=cpu"],
         "parallel.zero_stage=3, parallel.offload_optimizer=cpu"),
    ],
)  # fmt: skip
def test_cuda_graphs_are_refused_with_the_keys_that_they_do_not_go_with(overrides, named):
    load_config(overrides)
    text = refusal("trainer.cuda_graphs=true", *overrides)
    assert len(text.splitlines()) == 2
    assert f"trainer.cuda_graphs=true does not go with {named}; leave it false" in text


@pytest.mark.parametrize(
    "arm", ["nsa", "nsa_no_slc", "nsa_no_win", "nsa_random", "nsa_shared_kv", "window", "full", "full_gated"]
)
def test_cuda_graphs_go_with_every_arm(arm):
    for word in ("true", "auto"):
        assert load_config([f"attention={arm}", f"trainer.cuda_graphs={word}", "parallel=zero1"]).in_graphs


@pytest.mark.parametrize("words", [["trainer.cuda_graphs=false"], ["trainer.compile=true"], ["trainer.dtype=fp32"]])
def test_auto_takes_graphs_only_where_nothing_is_against_them(words):
    assert not load_config(["trainer.cuda_graphs=auto", *words]).in_graphs


def test_a_key_of_two_kinds_says_both():
    assert "trainer.cuda_graphs='fast' must be true or false, or one of auto" in refusal("trainer.cuda_graphs=fast")


def test_rows_that_the_processes_cannot_share_are_refused_for_every_stage():
    stages = ["stages.parts.a={tokens: 8192, seq_len: 512, mixture: {}, rope_factor: 1.0}",
              "stages.parts.b={tokens: null, seq_len: 2048, mixture: {}, rope_factor: 1.0}"]  # fmt: skip
    load_config(stages, processes=2)
    with pytest.raises(ConfigError, match=r"1 problem .*\n  stages.parts.b: 2 rows of 2048 tokens .* the 4 processes"):
        load_config(stages, processes=4)
    with pytest.raises(ConfigError, match=r"trainer.batch_rows=8 is not a multiple of the 3 processes; change trainer"):
        load_config([], processes=3)


def test_stage_1_is_refused_where_auto_is_bf16_together_with_all_that_is_wrong():
    words = ["parallel=zero1", "trainer.steps=0"]
    with pytest.raises(ConfigError) as caught:
        load_config(words, on_gpu=lambda: True)
    assert "2 problems in the configuration" in str(caught.value)
    assert "trainer.dtype=auto is bf16 on a GPU, and parallel.zero_stage=1 sums bf16 gradients" in str(caught.value)
    assert "1 problem in" in refusal(*words)
    load_config(["parallel=zero1"], on_gpu=lambda: False)
    load_config(["parallel=zero1", "trainer.dtype=fp32"], on_gpu=lambda: True)
    load_config(["parallel=zero2"], on_gpu=lambda: True)


def test_expert_widths_that_grouped_products_do_not_take_are_refused_on_a_gpu():
    load_config(["moe.expert_width=108"])
    with pytest.raises(ConfigError, match=r"moe\.expert_width=108 is not a multiple of 8, .* trainer\.dtype=fp32"):
        load_config(["moe.expert_width=108"], on_gpu=lambda: True)
    load_config(["moe.expert_width=108", "trainer.dtype=fp32"], on_gpu=lambda: True)
    load_config(["moe.expert_width=108", "model.dense_layers=4"], on_gpu=lambda: True)


def test_a_stage_that_no_step_is_left_for_is_refused():
    step = 512 * 8
    part = "{{tokens: {}, seq_len: 512, mixture: {{}}, rope_factor: 1.0}}"

    def parts(*tokens):
        each = ", ".join(f"{name}: {part.format(n)}" for name, n in zip("abc", tokens, strict=False))
        return ["trainer.steps=10", "trainer.seq_len=512", "trainer.batch_rows=8", f"stages.parts={{{each}}}"]

    load_config(parts(9 * step, "null"))
    assert "stages.parts.b is never reached" in refusal(*parts(9 * step + 1, "null"))
    assert "stages.parts.b.tokens=20 are none of the run's steps" in refusal(*parts(step + 100, 20, "null"))


def test_the_machine_is_looked_at_only_where_a_rule_depends_on_it():
    def looked():
        raise AssertionError

    load_config([], on_gpu=looked)


def test_all_wrong_overrides_are_reported_at_once():
    text = refusal("attention=nsaa", "+seed=1", "hydra.verbose=true")
    assert len(text.splitlines()) == 4


def test_a_missing_key_is_named():
    tree = to_tree(load_config())
    del tree["trainer"]["steps"], tree["optim"]
    with pytest.raises(ConfigError) as caught:
        config_from_tree(tree)
    assert "trainer.steps: missing" in str(caught.value)
    assert "optim: missing" in str(caught.value)


@pytest.mark.parametrize("value", [3, None, [1]])
def test_a_section_must_be_a_group_of_keys(value):
    with pytest.raises(ConfigError, match=r"optim.*must be a group of keys"):
        config_from_tree({**to_tree(load_config()), "optim": value})


def test_a_path_inside_data_root_is_taken(tmp_path):
    root = ["data=files", f"data.root={tmp_path}"]
    assert len(load_config([*root, f"data.paths=[a/b.jsonl,../{tmp_path.name}/c.txt]"]).data.paths) == 2
    assert "leaves" in refusal(*root, "data.paths=[a/../../b.jsonl]")


@pytest.mark.parametrize("kind", ["files", "tree", "hub"])
def test_an_absolute_path_is_taken_under_an_absolute_root_only(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text" / "a"
    overrides = ["data=files", f"data.kind={kind}", f"data.paths=[{path}]"]
    assert load_config([*overrides, f"data.root={tmp_path}"]).data.paths == (str(path),)
    assert f"data.paths: {path} leaves data.root=text; name it from there" in refusal(*overrides, "data.root=text")


def test_sources_take_from_their_neighbours_what_they_do_not_say():
    overrides = ["data=files", "data.text_field=body", "data.sources.one.paths=[a.jsonl]",
                 "data.sources.two={paths: [b.jsonl], text_field: other}"]  # fmt: skip
    config = load_config(overrides)
    assert {name: (s.paths, s.text_field) for name, s in config.data.sources.items()} == {
        "one": (("a.jsonl",), "body"),
        "two": (("b.jsonl",), "other"),
    }
    assert config.data.named_sources is config.data.sources
    assert config_from_tree(to_tree(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sources.one.path=[a]"], "data.sources.one.path: no such key; did you mean paths?"),
        (["data.sources.one={kind: files}"], "data.sources.one.paths is empty"),
        (["data.sources.one.kind=tarball"], "data.sources.one.kind='tarball' must be one of stdlib, files, tree, tar"),
        (["data.sources.one=5"], "data.sources.one=5 must be a group of keys"),
        (["data.sources=5"], "data.sources=5 must be a table of names"),
        (
            ["data.sources={one: {tokenizer: a.model}, two: {tokenizer: b.model}}"],
            "data.sources.two.tokenizer: all of data.sources share one; set data.tokenizer",
        ),
        (["data=files", "data.sources.one.paths=[../x]"], "data.sources.one.paths: ../x leaves data.root=."),
        (["data=files", "data.sources={a/b: {paths: [x]}}"], "data.sources='a/b' may hold letters"),
        (["data.languages=[en]"], "data.languages=['en'] needs records, which kind=stdlib has not"),
        (["data.take=0"], "data.take=0 must be positive, or null"),
        (["data.depth=-1", "data.min_chars=-1"], "data.min_chars=-1 must not be negative"),
        (["data.near_duplicates=1.0"], "data.near_duplicates=1.0 must lie between 0 and 1"),
        (["data.workers=-1"], "data.workers=-1 must not be negative"),
        (["data.on_error=ignore"], "data.on_error='ignore' must be one of stop, skip"),
    ],
)
def test_a_wrong_source_is_named_with_its_key(overrides, message):
    assert message in refusal(*overrides)


def test_a_data_set_of_the_hub_is_no_path_under_the_root():
    assert load_config(["data=fineweb_edu"]).data.paths == ("HuggingFaceFW/fineweb-edu",)


def test_an_arm_that_is_written_for_each_experiment_is_refused_where_it_is_not(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    shutil.copytree(load.CONFIG_DIR, folder)
    shutil.copy(folder / "experiment" / "tiny.yaml", folder / "experiment" / "mine.yaml")
    monkeypatch.setattr(load, "CONFIG_DIR", folder)
    assert load_config(["experiment=mine", "attention=full_gated"]).experiment == "mine"
    assert "write configs/arms/mine_full_gated_wide.yaml" in refusal("experiment=mine", "attention=full_gated_wide")
