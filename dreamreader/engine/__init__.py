"""The engine: sites, hooks, cache and firing report, driven by a `Reader`.

Other packages import from here alone; modules with an underscore are the engine's own.
"""

from dreamreader.engine._cache import Activation as Activation
from dreamreader.engine._cache import Cache as Cache
from dreamreader.engine._cache import RunRow as RunRow
from dreamreader.engine._clock import Clock as Clock
from dreamreader.engine._clock import DenoiserCall as DenoiserCall
from dreamreader.engine._clock_schedule import UNTIMED as UNTIMED
from dreamreader.engine._clock_schedule import StepInfo as StepInfo
from dreamreader.engine._clock_told import ToldClock as ToldClock
from dreamreader.engine._edit_context import EditContext as EditContext
from dreamreader.engine._edit_request import EditRequest as EditRequest
from dreamreader.engine._families import attention_facts as attention_facts
from dreamreader.engine._families.timestep import form_of as form_of
from dreamreader.engine._firing import Firing as Firing
from dreamreader.engine._firing import FiringReport as FiringReport
from dreamreader.engine._firing import ranges as ranges
from dreamreader.engine._function import apply_function as apply_function
from dreamreader.engine._gradients import SiteGradient as SiteGradient
from dreamreader.engine._language import FORWARD as FORWARD
from dreamreader.engine._pattern import join as join
from dreamreader.engine._pattern import parse as parse
from dreamreader.engine._probs import Attention as Attention
from dreamreader.engine._prompts import check_lengths as check_lengths
from dreamreader.engine._prompts import encoded as encoded
from dreamreader.engine._prompts import tokenize as tokenize
from dreamreader.engine._reader import Reader as Reader
from dreamreader.engine._recorded import of_tensor as of_tensor
from dreamreader.engine._recorded import one_branch as one_branch
from dreamreader.engine._recorded import row_means as row_means
from dreamreader.engine._recorded import token_means as token_means
from dreamreader.engine._recorder import available_memory as available_memory
from dreamreader.engine._replay import Evaluation as Evaluation
from dreamreader.engine._request import Record as Record
from dreamreader.engine._request import Request as Request
from dreamreader.engine._request import same as same
from dreamreader.engine._resolved import Selection as Selection
from dreamreader.engine._result import RunResult as RunResult
from dreamreader.engine._result import merged as merged
from dreamreader.engine._rows import plan_rows as plan_rows
from dreamreader.engine._selection import Box as Box
from dreamreader.engine._selection import in_steps as in_steps
from dreamreader.engine._selection import normalized as normalized
from dreamreader.engine._selection import normalized_steps as normalized_steps
from dreamreader.engine._sites import Site as Site
from dreamreader.engine._sites import SiteList as SiteList
from dreamreader.engine._spelling import spell as spell
from dreamreader.engine._step_caches import cache_hooks as cache_hooks
from dreamreader.engine._stepping import stepping as stepping
from dreamreader.engine._stream import ActivationView as ActivationView
from dreamreader.engine._stream import Stream as Stream
from dreamreader.engine._subject import innermost as innermost
from dreamreader.engine._subject import input_device as input_device
from dreamreader.engine._subject import is_encoder_decoder as is_encoder_decoder
from dreamreader.engine._taps import pick as pick
from dreamreader.engine._taps import put as put
from dreamreader.engine._watch import AttentionCall as AttentionCall
from dreamreader.engine._watch import Watch as Watch

# earlier names
Call, Flowing, Instant, Moment = AttentionCall, ActivationView, StepInfo, DenoiserCall
Place, Row = EditContext, RunRow
