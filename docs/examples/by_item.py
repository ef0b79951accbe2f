"""Documents are converted at a credit a page. A document that fails gets its pages back."""

from fastapi import FastAPI
from pydantic import BaseModel

from metered_billing import Account, MeteredBillingMiddleware, metered


class Document(BaseModel):
    id: str
    pages: int


class Folder(BaseModel):
    documents: list[Document]


class Order(BaseModel):
    folders: list[Folder]


class Converted(BaseModel):
    id: str
    status: str


class Result(BaseModel):
    done: list[list[Converted]]


def pages_of(body: Order) -> dict[str, int]:
    return {document.id: document.pages for folder in body.folders for document in folder.documents}


app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits="sqlite:///credits.db", account=lambda: Account("acme"))


@app.post("/convert")
@metered(cost=pages_of, outcomes="$.done[*][*]")
async def convert(body: Order) -> Result:
    return Result(done=[[converted(document) for document in folder.documents] for folder in body.folders])


def converted(document: Document) -> Converted:
    broken = document.id.startswith("broken")
    return Converted(id=document.id, status="failed" if broken else "succeeded")
