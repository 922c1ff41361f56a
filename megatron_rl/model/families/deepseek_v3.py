"""deepseek_v3: DeepSeek-V3 and Moonlight-16B-A3B, with sigmoid scores, an expert bias and layers behind the last.

Moonlight has rms_norm_eps 1e-5. For the norms of its latent vectors this is SGLang's value and not transformers'
(deepseek_v2.py).
"""

from __future__ import annotations

from dataclasses import replace

from megatron_rl.model.families.deepseek_v2 import FAMILY as DEEPSEEK_V2

FAMILY = replace(
    DEEPSEEK_V2,
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    names={**DEEPSEEK_V2.names, "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias",)},
    keys={**DEEPSEEK_V2.keys, "num_nextn_predict_layers": ("num_nextn_predict_layers", "num_mtp_layers")},
    fixed={"expert_bias": True},
    only={**{key: value for key, value in DEEPSEEK_V2.only.items() if key not in ("norm_topk_prob", "mlp_bias")},
          "scoring_func": "sigmoid"},
    tiny={**DEEPSEEK_V2.tiny, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
          "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0},
)
