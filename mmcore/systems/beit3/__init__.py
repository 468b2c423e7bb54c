"""BEiT-3: masked data modelling of images, texts and pairs by one transformer with experts (arXiv 2208.10442)."""

RECIPES = {
    "beit3": "recipe:Beit3",
    "beit3-retrieval": "finetune:Beit3Retrieval",
    "beit3-caption": "finetune:Beit3Caption",
    "beit3-vqa": "finetune:Beit3Vqa",
}
FOLDERS = {"beit3": "weights:load_beit3"}
PLANS = {
    "beit3": "plan:Beit3Plan",
    "beit3-retrieval": "plan:Beit3RetrievalPlan",
    "beit3-caption": "plan:Beit3CaptionPlan",
    "beit3-vqa": "plan:Beit3VqaPlan",
}
PROOFS = {
    "beit3": "recipe:PROOF",
    "beit3-retrieval": "finetune:RETRIEVAL_PROOF",
    "beit3-caption": "finetune:CAPTION_PROOF",
    "beit3-vqa": "finetune:VQA_PROOF",
}
