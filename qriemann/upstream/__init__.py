"""Every private part, patch and warning filter of other libraries that qriemann relies on, each with the reason.

Written for transformers 5.23, TRL 1.16, PEFT 0.21, datasets 5.2, bitsandbytes 0.50 and gguf 0.19. An entry names the test
that fails once upstream has changed, or that passes without the entry once it can go. Libraries are imported where they are
used, so importing this module costs nothing; only `tuners`, PEFT's part, is imported by itself.
"""

from qriemann.upstream.models import attention_of as attention_of
from qriemann.upstream.models import has_causal_lm as has_causal_lm
from qriemann.upstream.models import is_4_bit as is_4_bit
from qriemann.upstream.models import is_repacked as is_repacked
from qriemann.upstream.models import name_of as name_of
from qriemann.upstream.models import protect_quantized_weights as protect_quantized_weights
from qriemann.upstream.models import set_attention as set_attention
from qriemann.upstream.models import set_compute_dtype as set_compute_dtype
from qriemann.upstream.models import set_name as set_name
from qriemann.upstream.models import was_conv1d as was_conv1d
from qriemann.upstream.models import watching_quantization as watching_quantization
from qriemann.upstream.noise import quiet as quiet
from qriemann.upstream.noise import without_telemetry as without_telemetry
from qriemann.upstream.readers import gguf_parsed_once as gguf_parsed_once
from qriemann.upstream.readers import literal_folders as literal_folders
from qriemann.upstream.readers import today_is as today_is
from qriemann.upstream.trainers import TrainerCounts as TrainerCounts
from qriemann.upstream.trainers import take_one_gpu as take_one_gpu
from qriemann.upstream.trainers import token_sums as token_sums
