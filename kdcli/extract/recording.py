"""A teacher as a cache records it: who it is, what is kept of it, and its classifier where that is linear."""

from kdcli.cache.classifier import Classifier, fits_file
from kdcli.cache.filling import Filling
from kdcli.cache.provenance import TeacherRecord
from kdcli.extract.teachers import Teacher


def record_teacher(writer: Filling, teacher: Teacher) -> TeacherRecord:
    """Record a teacher in a cache, and with its features the classifier that makes its logits of them.

    It is kept whether or not the logits are: a head that is tried on features (of a student, say) costs nothing then.

    Raises:
        IdentityError: another teacher has this name in the cache, or keeps a kind differently.
    """
    recorded = writer.add_teacher(teacher.record)
    if "features" in recorded.outputs and writer.store.classifier(recorded.name) is None:
        found = _classifier_of(teacher)
        if found is not None:
            writer.add_classifier(recorded.name, found)
    return recorded


def _classifier_of(teacher: Teacher) -> Classifier | None:
    from kdcli.models.heads import linear_head

    model = teacher.model
    found = linear_head(model) if fits_file(model.num_classes, model.num_features) else None
    return None if found is None else Classifier(found[0].numpy(), found[1].numpy())
