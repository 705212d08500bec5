"""The formats of COMM's training mix (arXiv 2310.08825), most of them Shikra's (2306.15195).

    rec:REC_ref3_train.jsonl            expression -> box
    reg:GC_genome196_train.jsonl        box -> expression
    vqa:QUESTIONS,ANNOTATIONS           VQAv2's two files for train2014
    caption:captions_train2014.json     COCO's captions, or Shikra's CAP_coco2014_train.jsonl
    v7w:v7w_pointing_train.jsonl        Visual7W: which of four boxes?
    rd:GPT4GEN_RD_BoxCoT_train.jsonl    Shikra-RD: questions and answers with boxes of objects

The .jsonl files are Shikra's. KIND:FILE@TEMPLATES.json asks in the words of a JSON list, such as
Shikra's REC.json: ["Where is <expr> in the image <image>?", ...]. A sample's index chooses one.
"""

from pathlib import Path

from common.errors import InputError, printable
from common.images import open_image
from common.records import MARK, FileData, Sample, image_paths, is_text, read_records
from common.shikra import is_box, shikra_fields, write_boxes


def join(records, key, others, other_key):
    """Add to each record the fields of the other record that has the same key."""
    others = {str(other[other_key]): other for _, other in others if other_key in other}
    for where, record in records:
        yield where, others.get(str(record.get(key)), {}) | record


class Task(FileData):
    """One question and one answer about one image. Each format is a subclass with `fields`.

    fields(record, where) -> name of the image, text, answer, groups of boxes, and, if the record
    has them, width and height. The text replaces `place` in one of the questions. Each "<boxes>" in
    it or in the answer is replaced by a group of boxes, which are given in pixels.
    """

    has_boxes = True
    # the placeholder of Shikra's templates
    place = "<question>"
    questions = ("<image>\n<question>",)

    def __init__(self, path, image_dir=""):
        path, _, templates = str(path).partition("@")
        if templates:
            self.questions = [text for _, text in read_records(templates)]
        for text in self.questions:
            if not is_text(text) or text.count(MARK) != 1 or text.count(self.place) != 1:
                form = f"should have one {MARK} and one {self.place}"
                raise InputError(f"{templates}: {text!r:.80} {form}")
        super().__init__(path, image_dir or Path(path.partition(",")[0]).parent)

    def parse(self, record, where, index):
        name, text, answer, groups, *size = self.fields(record, where)
        question = self.questions[index % len(self.questions)].replace(self.place, text)
        both = question + answer
        is_good = is_text(both) and both.count(MARK) == 1 and all(map(is_box, sum(groups, [])))
        if not is_good or both.count("<boxes>") != len(groups):
            raise InputError(f"{where}: has text {both!r:.80} with boxes {groups!r:.80}")
        turn = [question, answer]
        if size:
            turn, groups = write_boxes(turn, groups, size, where), []
        images = image_paths([name], self.image_dir, where)
        return *Sample(images, [turn], f"{printable(name)}#{index}", size=size or None), groups

    def __getitem__(self, index):
        *fields, groups = self.load(index)
        sample = Sample(*fields)
        if groups:
            image = open_image(sample.images[0])
            turn = write_boxes(sample.turns[0], groups, image.size, sample.id)
            sample = sample._replace(images=[image], turns=[turn])
        return sample


class Comprehension(Task):
    """{"img_path", "expression", "bbox": [x1, y1, x2, y2], "width", "height"}."""

    place = "<expr>"
    questions = (
        "<image>\nWhere is <expr>? Answer with the box [x1,y1,x2,y2].",
        "<image>\nGive the coordinates of <expr> in the picture.",
        "<image>\nPlease find <expr> and tell me its box.",
        "<image>\nWhich region shows <expr>? Answer with a box.",
    )

    def fields(self, record, where):
        name, expression, box, *size = shikra_fields(record, where)
        return name, expression, "<boxes>", [[box]], *size


class Generation(Comprehension):
    """{"img_path", "expression", "bbox", "width", "height"}, for the reverse task."""

    place = "<objs>"
    questions = (
        "<image>\nWhat is in the box <objs>? Tell it from everything else.",
        "<image>\nDescribe the region <objs>.",
        "<image>\nGive a phrase that means only the object at <objs>.",
        "<image>\nWhich object does the box <objs> show?",
    )

    def fields(self, record, where):
        name, expression, box, *others = super().fields(record, where)
        return name, box, expression, *others


class VQA(Task):
    """{"question_id", "image_id", "question"} in "questions", and the answers in another file.

    That has {"question_id", "multiple_choice_answer"} in "annotations".
    """

    has_boxes = False
    questions = ("<image>\n<question>\nAnswer the question using a single word or phrase.",)

    def read(self, path):
        questions, _, annotations = path.partition(",")
        if not annotations:
            raise InputError(f"vqa:{path}: needs two files, vqa:QUESTIONS,ANNOTATIONS")
        questions = read_records(questions, "questions")
        annotations = read_records(annotations, "annotations")
        return join(questions, "question_id", annotations, "question_id")

    def fields(self, record, where):
        name = f"COCO_train2014_{record['image_id']:0>12}.jpg"
        return name, record["question"], record["multiple_choice_answer"], []


class Captions(Task):
    """{"img_path", "caption"}, or COCO's {"image_id", "caption"} in "annotations".

    COCO's file has {"id", "file_name"} in "images", too.
    """

    has_boxes = False
    place = MARK
    questions = ("<image>\nDescribe the image in one sentence.",)

    def read(self, path):
        images = read_records(path, "images")
        return join(read_records(path, "annotations"), "image_id", images, "id")

    def fields(self, record, where):
        name = record.get("img_path") or record["file_name"]
        return name, MARK, record["caption"].strip(), []


class Visual7W(Task):
    """{"file_path", "question", "candidates": boxes, "answer": one of them}.

    The candidates are sorted: their order says nothing about the answer.
    """

    def fields(self, record, where):
        boxes = sorted(record["candidates"])
        text = record["question"] + " Choose from" + " <boxes>" * len(boxes)
        return record["file_path"], text, "<boxes>", [[box] for box in (*boxes, record["answer"])]


class ShikraRD(Task):
    """{"img_path", "question", "cot_with_ans", "boxes", "question_boxes_seq", "answer_boxes_seq"}.

    Behind each "<ph_ed>" come the boxes of a phrase. A boxes_seq has their indices.
    """

    questions = ("<image>\n<question> Explain it, with the box [x1,y1,x2,y2] of each object.",)

    def fields(self, record, where):
        groups = []
        for indices in record["question_boxes_seq"] + record["answer_boxes_seq"]:
            groups.append([record["boxes"][i] for i in indices])
        texts = [record[key].replace("<ph_st>", "") for key in ("question", "cot_with_ans")]
        texts = [text.replace("<ph_ed>", "<boxes>") for text in texts]
        return record["img_path"], *texts, groups
