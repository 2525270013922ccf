"MSINet for object re-identification: search, training, retrieval and figures. Names are imported when they are first used."
__version__ = "0.0.1"

import lazy_loader

_PLACES = {  # module -> the names that `import msinet` offers
    "core": ["macs", "n_params", "set_seed"],
    "config": ["DemoConfig", "PretrainConfig", "SearchConfig", "TrainConfig", "UnsupConfig", "TABLE1"]
    + ["SEARCH", "TRAIN", "UNSUP"],
    "errors": ["InputError"],
    "data.items": ["Item", "ReIDData"],
    "data.folder": ["folder"],
    "data.layouts": ["market1501", "msmt17", "vehicleid", "veri776"],
    "data.sets": ["get_data"],
    "rendering.world": ["mask", "render", "synth", "write_layout"],
    "retrieval.places": ["Embeddings"],
    "retrieval.ranking": ["rank", "Ranking"],
    "retrieval.evaluate": ["embed", "embeddings", "evaluate", "retrieval_metrics"],
    "retrieval.neighbours": ["rerank_dense"],
    "retrieval.rerank": ["jaccard", "rerank"],
    "ops": ["ChannelGate", "CrossAttention", "Exchange", "Keep", "OPS"],
    "space": ["alphas", "Cell", "derived", "genotype", "Mixed", "MSINet", "supernet"],
    "necks": ["BNNeck", "FBLNeck", "ReIDNet"],
    "losses": ["id_loss", "triplet"],
    "tcm": ["Memory", "twin_split"],
    "sam": ["activation_vectors", "alignment", "PAM", "SAM"],
    "backbones": ["network", "osnet", "cdnet", "resnet50", "vit"],
    "engine.checkpoint": ["load", "save"],
    "zoo": ["zoo_cards", "zoo_table", "run_path"],
    "weights": ["from_official", "load_initial_weights", "open_net"],
    "training.search": ["search", "SearchStep"],
    "training.train": ["train", "TrainStep"],
    "training.pretrain": ["pretrain"],
    "unsup.train": ["uda", "usl"],
    "figures.report": ["report"],
    "figures.run": ["run_figures", "save_figures", "strips_of"],
    "deploy.gallery": ["Gallery", "verify"],
    "quickstart": ["demo"],
    "entries": ["resume"],
}

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=_PLACES)
