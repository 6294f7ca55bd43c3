"""Settings of the judges: which weights, which servers, where they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ScorerArguments:
    """Where the judges find their weights and servers. Files are fetched as `docs/rewards.md` says."""

    reward_device: str | None = field(
        default=None, metadata={"help": "Device of the local judges, such as cuda:1; by default that of the policy."}
    )
    reward_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Autocast of the local judges. bfloat16 moves cosines by about 2e-4, MANIQA by 7e-5."},
    )
    reward_batch_size: int = field(default=64, metadata={"help": "Images in one forward pass of a local judge."})
    clip_model: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={"help": "Hugging Face CLIP, folder or hub name. Released code: openai/clip-vit-base-patch32."},
    )
    hpsv2_weights: str = field(
        default="weights/HPS_v2.1_compressed.pt",
        metadata={"help": "HPSv2 state dict, .pt or .safetensors; v2.1 is the paper's."},
    )
    hpsv2_architecture: str = field(
        default="ViT-H-14", metadata={"help": "open_clip model name, or a folder with open_clip_config.json."}
    )
    maniqa_weights: str = field(
        default="weights/ckpt_koniq10k.pt", metadata={"help": "MANIQA state dict trained on KonIQ-10k."}
    )
    maniqa_num_crops: int = field(default=20, metadata={"help": "Crops of 224 x 224 pixels per image."})
    maniqa_crop_rule: Literal["grid", "corners", "random"] = field(
        default="grid",
        metadata={
            "help": "grid: pyiqa's positions, the same every time. corners: centre and corners, up to 5. "
            "random: the released code's, new every time, so the reward is noisy."
        },
    )
    maniqa_batch_size: int = field(default=40, metadata={"help": "MANIQA crops in one forward pass."})
    qwen_model: str = field(
        default="Qwen/Qwen2.5-VL-3B-Instruct",
        metadata={"help": "Folder or hub name (modes generate and logits)."},
    )
    qwen_mode: Literal["generate", "logits", "server"] = field(
        default="generate",
        metadata={
            "help": "generate: greedy answers. logits: probability of 1 against 0 for the two yes/no questions. "
            "server: an OpenAI-compatible server, asked beside the local judges."
        },
    )
    qwen_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "Weights of the local judge."}
    )
    qwen_batch_size: int = field(default=64, metadata={"help": "Conversations in one call of the local judge."})
    qwen_max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, as in the released code."})
    qwen_url: str = field(default="http://127.0.0.1:20004/v1", metadata={"help": "Judge server (mode server)."})
    qwen_server_model: str = field(
        default="Qwen2.5-VL-3B-Instruct", metadata={"help": "Model name that the judge server knows."}
    )
    pickscore_model: str = field(default="yuvalkirstain/PickScore_v1", metadata={"help": "Folder or hub name."})
    pickscore_processor: str = field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        metadata={"help": "Folder or hub name of PickScore's tokenizer and image processor."},
    )
    image_reward_weights: str = field(default="weights/ImageReward.pt", metadata={"help": "ImageReward v1.0 weights."})
    image_reward_tokenizer: str = field(
        default="google-bert/bert-base-uncased", metadata={"help": "Folder or hub name of ImageReward's tokenizer."}
    )
    aesthetic_weights: str = field(
        default="weights/sac+logos+ava1-l14-linearMSE.pth", metadata={"help": "Head of the LAION aesthetic predictor."}
    )
    aesthetic_clip_model: str = field(
        default="openai/clip-vit-large-patch14", metadata={"help": "CLIP under the aesthetic head; shared with clip."}
    )
    deqa_url: str = field(default="http://127.0.0.1:18086/", metadata={"help": "DeQA server of reward-server."})
    geneval_detector: str = field(
        default="facebook/mask2former-swin-small-coco-instance",
        metadata={"help": "GenEval's Mask2Former, folder or hub name."},
    )
    geneval_color_model: str = field(
        default="ViT-L-14-quickgelu", metadata={"help": "open_clip model that tells GenEval's colours."}
    )
    geneval_color_weights: str = field(default="openai", metadata={"help": "Its weights: a tag or a file."})
    geneval_object_names: str = field(
        default="data/geneval/object_names.txt",
        metadata={"help": "GenEval's object names; `python -m dataset.fetch geneval` brings them."},
    )
    geneval_url: str | None = field(
        default=None,
        metadata={"help": "Ask reward-server for GenEval (http://127.0.0.1:18085/) instead of detecting here."},
    )
    geneval_score: Literal["scores", "rewards", "strict_rewards"] = field(
        default="rewards",
        metadata={"help": "scores: partial credit. rewards: 0 or 1, at least the count. strict_rewards: exact count."},
    )
    unified_reward_url: str = field(
        default="http://127.0.0.1:17140/v1", metadata={"help": "UnifiedReward server (SGLang, OpenAI protocol)."}
    )
    unified_reward_model: str = field(
        default="UnifiedReward-7b-v1.5", metadata={"help": "Model name that the UnifiedReward server knows."}
    )
    ocr_detector: str = field(
        default="PaddlePaddle/PP-OCRv5_server_det_safetensors", metadata={"help": "Text finder, folder or hub name."}
    )
    ocr_recognizer: str = field(
        default="PaddlePaddle/PP-OCRv5_server_rec_safetensors", metadata={"help": "Line reader, folder or hub name."}
    )
    remote_rewards: list[str] = field(
        default_factory=list,
        metadata={"help": "Judges that run in `python -m reward_utils.server`, each as NAME=URL."},
    )
    server_timeout_s: float = field(default=120.0, metadata={"help": "Longest wait for one answer of a server."})
    server_retries: int = field(default=3, metadata={"help": "Further attempts after a failed request."})
    server_concurrency: int = field(default=32, metadata={"help": "Requests under way at once to a chat server."})

    def network_settings(self) -> dict:
        """Device, dtype and batch size as `Network` takes them."""
        return {
            "device": self.reward_device or "cpu",
            "dtype": self.reward_dtype,
            "batch_size": self.reward_batch_size,
        }

    def server_settings(self) -> dict:
        """Timeout and retries as `Server` takes them."""
        return {"timeout_s": self.server_timeout_s, "retries": self.server_retries}
