"""Masked image modelling: one recipe whose target differs (SimMIM, MaskFeat, BEiT, BEiT v2, MVP, EVA, data2vec), and
the training of BEiT v2's tokenizer (VQ-KD)."""

RECIPES = {
    "simmim": "recipe:SimMim",
    "maskfeat": "recipe:MaskFeat",
    "beit": "recipe:Beit",
    "beit2": "recipe:Beit2",
    "mvp": "recipe:Mvp",
    "eva": "recipe:Eva",
    "data2vec": "recipe:Data2Vec",
    "vqkd": "tokenizer_recipe:VqKd",
}
FOLDERS = {"beit": "weights:load_beit", "data2vec-vision": "weights:load_data2vec"}
FILES = {"beit": "weights:published_tower"}
PLANS = {
    "simmim": "plan:SimMimPlan",
    "maskfeat": "plan:MaskFeatPlan",
    "beit": "plan:BeitPlan",
    "beit2": "plan:Beit2Plan",
    "mvp": "plan:MvpPlan",
    "eva": "plan:EvaPlan",
    "data2vec": "plan:Data2VecPlan",
    "vqkd": "plan:VqKdPlan",
}
PROOFS = {
    "simmim": "recipe:SIMMIM",
    "maskfeat": "recipe:MASKFEAT",
    "beit": "recipe:BEIT",
    "beit2": "recipe:BEIT2",
    "mvp": "recipe:MVP",
    "eva": "recipe:EVA",
    "data2vec": "recipe:DATA2VEC",
    "vqkd": "tokenizer_recipe:PROOF",
}
