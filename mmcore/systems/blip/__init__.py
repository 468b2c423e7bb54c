"""BLIP: one BERT that aligns, reads and writes (arXiv 2201.12086)."""

RECIPES = {
    "blip": "recipe:Blip",
    "blip-caption": "recipe:BlipCaption",
    "blip-retrieval": "recipe:BlipRetrieval",
    "blip-vqa": "recipe:BlipVqa",
}
FOLDERS = {"blip": "weights:load_blip"}
PLANS = {
    "blip": "plan:BlipPlan",
    "blip-caption": "plan:BlipCaptionPlan",
    "blip-retrieval": "plan:BlipRetrievalPlan",
    "blip-vqa": "plan:BlipVqaPlan",
}
PROOFS = {
    "blip": "recipe:PROOF",
    "blip-caption": "recipe:PROOF_CAPTION",
    "blip-retrieval": "recipe:PROOF_RETRIEVAL",
    "blip-vqa": "recipe:PROOF_VQA",
    "capfilt": "capfilt:PROOF",
}
