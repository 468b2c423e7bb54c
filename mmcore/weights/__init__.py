"""Weights and settings in the files of other libraries: a system writes two tables, and both directions follow.

    HF = Layout(                                          # names of weights: ours, theirs
        {
            "visual.class_embedding": leading("vit.embeddings.cls_token", 2),       # [D] here, [1, 1, D] there
            "visual.patch_embed": "vit.embeddings.patch_embeddings.projection",     # .weight, and .bias if we have one
            **under(                                      # a part, so that both sides' beginnings stand once
                "visual.transformer.blocks.{i}",          # all layers that the model has
                "vit.encoder.layer.{i}",
                {"norm1": "layernorm_before", "attn.qkv": "attention.attention.{query,key,value}"},
            ),
            "pool.{q,kv}.weight": "head.attention.in_proj_weight",                  # of rows one after the other
            "logit_scale": scalar("logit_scale"),         # [1] here, 0-d there
            "visual.proj.weight": transposed("proj"),
            "text_head": optional("text_head"),           # not theirs: written by our names, else as it began
        },
        tied={"text_head.weight": "text.word.weight"},    # written once
        unread=["embeddings.position_ids"],               # theirs, of older files, not needed
        older=[("module.", "")],                          # beginnings of names in other versions
    )
    HF_SETTINGS = Settings(                               # config.json: our field, their key, their default
        section("vision", "vision_config", transformers_keys(width=768, num_layers=12, norm_eps=1e-6)),
        kind=ViTConfig, kinds={"vision": VisionConfig}, model_types=("vit",), must={"qkv_bias": True},
    )

    model = MyModel(HF_SETTINGS.read(op, read_json(op, folder / "config.json")))
    model.load_state_dict(model.state_dict() | HF.read(op, read_folder(op, folder), model.state_dict()))
    save_folder(op, folder, HF_SETTINGS.write(op, model.config), HF.write(model.state_dict()))

The names that a layout is read by are the model's own, so no table tells how many layers there are, which of them have
a bias, or which parts a configuration leaves out; a name of ours without a row is an error, and of theirs too. Rows of
encoders that many models share are in `mmcore.parts.vit_names`, language models in `mmcore.parts.language_weights`.
"""
