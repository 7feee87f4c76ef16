"""What is known of one layer: the plan for it, its record in integers, the kernel that runs it."""

from dmq_ao.records.packed import PACKED_BITS as PACKED_BITS
from dmq_ao.records.packed import PackedRecords as PackedRecords
from dmq_ao.records.packed import PackedWeight as PackedWeight
from dmq_ao.records.packed import packed_record as packed_record
from dmq_ao.records.plan import Kernel as Kernel
from dmq_ao.records.plan import LayerPlan as LayerPlan
from dmq_ao.records.plan import overhead_bits as overhead_bits
from dmq_ao.records.plan import widest_that_fits as widest_that_fits
from dmq_ao.records.record import ActivationRecord as ActivationRecord
from dmq_ao.records.record import LayerRecord as LayerRecord
from dmq_ao.records.record import WeightRecord as WeightRecord
from dmq_ao.records.record import joint_record as joint_record
from dmq_ao.records.record import on_device as on_device
from dmq_ao.records.record import outline as outline
from dmq_ao.records.record import record_tensor as record_tensor
from dmq_ao.records.record import with_positive_scale as with_positive_scale
from dmq_ao.records.record import zero_point_dtype as zero_point_dtype
from dmq_ao.records.shifts import channel_shifts as channel_shifts
from dmq_ao.records.shifts import shift_fits_int8 as shift_fits_int8
from dmq_ao.records.shifts import shifted_codes as shifted_codes
